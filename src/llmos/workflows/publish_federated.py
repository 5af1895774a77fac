"""Register the adapter that a federated job has trained, at the coordinator and at its sites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmos.engines.federated.server_optimizer import ServerState
from llmos.errors import ModelExists
from llmos.federations import register
from llmos.federations.manifest import Manifest
from llmos.federations.register import FederatedJob, FederatedState
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.models import lora
from llmos.models.lora import LoraAdapter
from llmos.privacy import Classification
from llmos.reports.federated_rounds import rounds_sha256
from llmos.workflows import federated_adapter
from llmos.workflows.federated_state import weights_sha256
from llmos.workflows.parts import Parts


def at_coordinator(
    job: FederatedJob,
    state: ServerState,
    answers: Mapping[str, Mapping[str, Any]],
    who: Principal,
    parts: Parts,
) -> dict[str, Any]:
    """Publish the global adapter and end the job, in one transaction.

    Raises:
        JobError: the job has ended meanwhile.
        UnknownModel, ModelError: this home has lost the base model.
    """
    kernel, manifest = parts.kernel, job.manifest
    _loaded, adapter = federated_adapter.load(manifest, parts)
    object_id, digest = store(adapter, state.weights, manifest, parts)
    name = free_name(manifest.output, manifest.id, parts)
    accepted = {site: said for site, said in answers.items() if said["accepted"]}
    classes = {str(said.get("classification")) for said in accepted.values()}
    rounds = register.rounds(kernel.store, job.id)
    card = model_card(manifest, classes) | {"rounds": rounds, "sites": sorted(accepted)}
    details = {
        "job": job.id,
        "model": name,
        "digest": digest,
        "weights": weights_sha256(state),
        "rounds_sha256": rounds_sha256(rounds),
    }
    with kernel.monitor.act(who, Action.COORDINATE, kernel.home, details=details) as conn:
        parts.registry.publish_adapter(
            conn, name=name, base=manifest.model, object_id=object_id, digest=digest, card=card
        )
        register.end(conn, job, FederatedState.DONE)
    return {"model": name, "digest": digest}


def store(
    adapter: LoraAdapter, weights: NDArray[np.float32], manifest: Manifest, parts: Parts
) -> tuple[str, str]:
    """Put trained weights (P,) into the vault as a PEFT adapter; return object id and digest."""
    adapter.load_vector(torch.from_numpy(weights.copy()).to(adapter.parameters()[0].device))
    return parts.registry.store_adapter(lora.to_peft(adapter, manifest.model))


def free_name(wanted: str, job_id: str, parts: Parts) -> str:
    """Return the wanted name of a model, or one with the job's id where it is taken."""
    taken = {entry.name for entry in parts.registry.models()}
    if wanted not in taken:
        return wanted
    other = f"{wanted[:40]}-{job_id}"
    if other in taken:
        raise ModelExists(f"a model {other!r} exists already")
    return other


def model_card(manifest: Manifest, classes: set[str]) -> dict[str, Any]:
    """Return what a registry keeps about a federated adapter; unknown data counts as sensitive."""
    harmless = {str(Classification.PUBLIC), str(Classification.SYNTHETIC)}
    sensitive = not classes or bool(classes - harmless)
    worst = Classification.SENSITIVE if sensitive else Classification.SYNTHETIC
    privacy = manifest.privacy
    return {
        "classification": str(worst),
        "private": privacy is not None,
        "epsilon": None if privacy is None else privacy.epsilon,
        "delta": None if privacy is None else privacy.delta,
        "job": manifest.id,
        "request": {"purpose": manifest.purpose},
        "federated": manifest.model_dump(mode="json"),
        "manifest_sha256": manifest.digest,
    }
