"""The adapter of a federated job: every home derives the same one from the manifest's numbers."""

from __future__ import annotations

import hashlib
from typing import Any, Final

import numpy as np
import rfc8785
import torch
from numpy.typing import NDArray

from llmos.errors import ModelError
from llmos.federations.manifest import Adapter, Manifest
from llmos.models import lora
from llmos.models.devices import resolve_device
from llmos.models.loading import LoadedModel, load_base
from llmos.models.lora import LoraAdapter, LoraConfig, Parametrisation
from llmos.models.registry import ModelEntry
from llmos.workflows.parts import Parts

_ALPHA_OF_RANK: Final = 2.0  # as `llmos train` does
_TARGETS: Final = {"all": (), "attention": ("q_proj", "k_proj", "v_proj", "o_proj")}
_PARAMETRISATIONS: Final = {
    "ffa-lora": Parametrisation.FFA,
    "fed-sb": Parametrisation.SB,
}


def attach(asked: Adapter, loaded: LoadedModel) -> LoraAdapter:
    """Put the adapter that a manifest asks for on a loaded base model."""
    config = LoraConfig(
        rank=asked.rank,
        alpha=_ALPHA_OF_RANK * asked.rank,
        last_layers=asked.last_layers,
        targets=_TARGETS[asked.targets],
        parametrisation=_PARAMETRISATIONS[asked.parametrisation],
    )
    return lora.attach(loaded.model, config, seed=asked.seed)


def layout(adapter: LoraAdapter, asked: Adapter, model_digest: str) -> str:
    """Return the SHA-256 of what each number of the trained vector means."""
    meaning: dict[str, Any] = {
        "model": model_digest,
        "adapter": asked.model_dump(mode="json"),
        "layers": list(adapter.layers),
        "shapes": [list(parameter.shape) for parameter in adapter.parameters()],
    }
    return hashlib.sha256(rfc8785.dumps(meaning)).hexdigest()


def find_base(model: str, digest: str, parts: Parts) -> ModelEntry:
    """Return this home's base model, if it is the very one that is meant.

    Raises:
        UnknownModel: there is none of this name.
        ModelError: it has another digest.
    """
    entry = parts.registry.model(model)
    if entry.kind != "base" or entry.digest != digest:
        raise ModelError(
            f"{model} is not the base model that the job means (SHA-256 {digest[:16]}...)",
            hint="pull the same model as the coordinator: compare `llmos model show`",
        )
    return entry


def load(manifest: Manifest, parts: Parts) -> tuple[LoadedModel, LoraAdapter]:
    """Load the base model of a job and put its adapter on it.

    Raises:
        UnknownModel, ModelError: this home has not got the base model, or what it makes of it is
            not what the manifest says.
    """
    entry = find_base(manifest.model, manifest.model_digest, parts)
    device = resolve_device(parts.kernel.config.device)
    loaded = load_base(parts.kernel.config.home / entry.location, device)
    adapter = attach(manifest.adapter, loaded)
    if layout(adapter, manifest.adapter, entry.digest) != manifest.layout:
        raise ModelError(
            f"{manifest.id} trains another vector than this home makes of {manifest.model}",
            hint="coordinator and sites need versions of LLMOS that agree",
        )
    return loaded, adapter


def to_numpy(vector: torch.Tensor) -> NDArray[np.float32]:
    """Copy a vector (P,) out of PyTorch."""
    return np.asarray(vector.detach().cpu().numpy(), dtype=np.float32)
