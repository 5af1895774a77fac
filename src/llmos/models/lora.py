"""Low-rank adapters on the linear layers of a frozen model, in the file format of PEFT.

An adapted layer computes y = x W^T + b + s (x A^T) B^T with s = alpha / rank, where W and b stay
frozen in the base model's dtype and A, B are float32 (Hu et al. 2021, arXiv:2106.09685). With a
core R between the two it computes y = x W^T + b + s (x A^T) R^T B^T.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import linear

from llmos.errors import ModelError
from llmos.models.blocks import find_blocks
from llmos.models.subspace import frozen_factors

WEIGHTS_FILE: Final = "adapter_model.safetensors"
CONFIG_FILE: Final = "adapter_config.json"
_PEFT_PREFIX: Final = "base_model.model."
_PEFT_REFUSED: Final = (
    "use_dora",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
)


class Parametrisation(StrEnum):
    """Which factors of the update are trained; with FFA and SB averaging adapters is exact."""

    LORA = "lora"  # A and B
    FFA = "ffa"  # B; A stays as it was drawn (Sun et al. 2024, arXiv:2403.12313)
    SB = "sb"  # R; A and B come from W (Singhal et al. 2025, arXiv:2502.15436)


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Which linear layers get an adapter, and of what size."""

    rank: int = 16
    alpha: float = 32.0  # the update is scaled by alpha / rank
    targets: tuple[str, ...] = ()  # last part of the layers' names; () means every linear layer
    last_layers: int | None = None  # adapt only this many blocks, counted from the output
    parametrisation: Parametrisation = Parametrisation.LORA

    def __post_init__(self) -> None:
        """Refuse sizes for which there is no adapter."""
        if self.rank < 1 or not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ModelError(f"LoRA needs rank >= 1 and alpha > 0, not {self.rank}, {self.alpha}")
        if self.last_layers is not None and self.last_layers < 1:
            raise ModelError(f"last_layers must be 1 or more, not {self.last_layers}")

    @property
    def scaling(self) -> float:
        """Return the factor of the low-rank update."""
        return self.alpha / self.rank


# How an adapted layer multiplies its input (..., in); an engine may pass its own for the time of a
# step, which may also take the two inputs of a gate.
Product = Callable[..., Tensor]


def plain_product(layer: LoRALinear, x: Tensor) -> Tensor:
    """Multiply with ordinary differentiable operations: the reference and the way to infer."""
    u = linear(x, layer.lora_a.to(x.dtype))
    if layer.core is not None:
        u = linear(u, layer.core.to(x.dtype))
    update = linear(u, layer.lora_b.to(x.dtype))
    return linear(x, layer.weight, layer.bias).add(update, alpha=layer.scaling)


class LoRALinear(nn.Module):
    """A frozen linear layer with a low-rank update, of which some factors are trained."""

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        """Wrap `base`; every factor is zero, so that the model is unchanged."""
        super().__init__()
        rank, kind = config.rank, config.parametrisation
        self.base = base
        self.scaling = config.scaling
        self.parametrisation = kind
        self.lora_a = self._factor(rank, base.in_features, trained=kind is Parametrisation.LORA)
        self.lora_b = self._factor(base.out_features, rank, trained=kind is not Parametrisation.SB)
        self.core = self._factor(rank, rank) if kind is Parametrisation.SB else None
        self.product: Product = plain_product

    def _factor(self, rows: int, columns: int, *, trained: bool = True) -> nn.Parameter:
        zeros = torch.zeros(rows, columns, dtype=torch.float32, device=self.base.weight.device)
        return nn.Parameter(zeros, requires_grad=trained)

    @property
    def trained(self) -> tuple[nn.Parameter, ...]:
        """Return the factors that are trained, A before B."""
        return tuple(p for p in self.parameters(recurse=False) if p.requires_grad)

    @property
    def weight(self) -> Tensor:
        """Return the frozen weight (out, in)."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """Return the frozen bias (out,)."""
        return self.base.bias

    @property
    def up(self) -> Tensor:
        """Return B (out, rank), with the core in it where there is one: B R."""
        return self.lora_b if self.core is None else self.lora_b @ self.core

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to y (..., out)."""
        return self.product(self, x)


@dataclass(frozen=True, slots=True, eq=False)
class LoraAdapter:
    """The adapted layers of one model, by their names in that model and in its order."""

    model: nn.Module
    config: LoraConfig
    layers: Mapping[str, LoRALinear]
    blocks: str  # name of the list that holds the model's blocks, such as `model.layers`
    adapted_blocks: range  # positions of the adapted blocks in that list

    def parameters(self) -> list[nn.Parameter]:
        """Return every trained factor; their order defines the layout of `vector`."""
        return [factor for layer in self.layers.values() for factor in layer.trained]

    def vector(self) -> Tensor:
        """Copy all parameters into one float32 vector (P,)."""
        return torch.cat([parameter.detach().flatten() for parameter in self.parameters()])

    def load_vector(self, vector: Tensor) -> None:
        """Write a vector (P,) back into the parameters."""
        start = 0
        with torch.no_grad():
            for parameter in self.parameters():
                end = start + parameter.numel()
                parameter.copy_(vector[start:end].view_as(parameter))
                start = end

    @contextmanager
    def using(self, product: Product) -> Iterator[None]:
        """Let every adapted layer multiply with `product` inside the block."""
        try:
            for layer in self.layers.values():
                layer.product = product
            yield
        finally:
            for layer in self.layers.values():
                layer.product = plain_product


def attach(model: nn.Module, config: LoraConfig, *, seed: int | None = None) -> LoraAdapter:
    """Freeze `model` and put an adapter on its chosen linear layers; the head never gets one.

    A is drawn as in PEFT (Kaiming uniform), which needs no secrecy; `seed` repeats the draw. FFA
    needs it, since A is not in the vector; SB draws nothing.

    Raises:
        UnsupportedModel: the model has no blocks with `nn.Linear` layers of these names.
        ModelError: FFA has no seed, or SB's rank is above a side of an adapted layer.
    """
    blocks = find_blocks(model)
    adapted = range(max(0, blocks.count - (config.last_layers or blocks.count)), blocks.count)
    chosen = blocks.linear_layers(adapted, config.targets)
    if config.parametrisation is Parametrisation.FFA and seed is None:
        raise ModelError("FFA needs a seed: its A is never trained and has to be drawn alike again")
    smallest = min(min(layer.weight.shape) for layer in chosen.values())
    if config.parametrisation is Parametrisation.SB and config.rank > smallest:
        raise ModelError(f"SB needs a rank of at most {smallest} here, not {config.rank}")
    model.requires_grad_(requires_grad=False)
    generator = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
    layers = {path: LoRALinear(linear, config) for path, linear in chosen.items()}
    for path, layer in layers.items():
        _start(layer, generator)
        model.set_submodule(path, layer)
    return LoraAdapter(model, config, layers, blocks.name, adapted)


def detach(adapter: LoraAdapter) -> None:
    """Put the base layers back; the adapter's parameters stay readable."""
    for path, layer in adapter.layers.items():
        adapter.model.set_submodule(path, layer.base)


def to_peft(adapter: LoraAdapter, base_name: str) -> dict[str, bytes]:
    """Write an adapter of any parametrisation as the two files of a PEFT LoRA, by file name."""
    tensors = {}
    for path, layer in adapter.layers.items():
        for part, factor in (("lora_A", layer.lora_a), ("lora_B", layer.up)):
            tensors[f"{_PEFT_PREFIX}{path}.{part}.weight"] = factor.detach().cpu().contiguous()
    partial = adapter.config.last_layers is not None
    fields = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "layers_pattern": adapter.blocks.rpartition(".")[2] if partial else None,
        "layers_to_transform": list(adapter.adapted_blocks) if partial else None,
        "lora_alpha": adapter.config.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": adapter.config.rank,
        "target_modules": sorted({path.rpartition(".")[2] for path in adapter.layers}),
        "task_type": "CAUSAL_LM",
    }
    return {
        WEIGHTS_FILE: safetensors.torch.save(tensors, metadata={"format": "pt"}),
        CONFIG_FILE: json.dumps(fields, indent=2, sort_keys=True).encode(),
    }


def from_peft(model: nn.Module, files: Mapping[str, bytes]) -> LoraAdapter:
    """Attach a PEFT LoRA checkpoint to `model`.

    Raises:
        ModelError: a file is missing or unreadable, the checkpoint is of another kind, or it does
            not fit the model.
    """
    try:
        fields = json.loads(files[CONFIG_FILE])
        tensors = safetensors.torch.load(files[WEIGHTS_FILE])
        config = _config_of(fields, find_blocks(model).count)
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ModelError(f"this is no readable PEFT checkpoint: {error!r}") from error
    adapter = attach(model, config, seed=0)
    expected = {
        f"{_PEFT_PREFIX}{path}.{part}.weight": parameter
        for path, layer in adapter.layers.items()
        for part, parameter in (("lora_A", layer.lora_a), ("lora_B", layer.lora_b))
    }
    shapes = {key: parameter.shape for key, parameter in expected.items()}
    if {key: tensor.shape for key, tensor in tensors.items()} != shapes:
        detach(adapter)
        raise ModelError("the adapter was trained on a model of another shape")
    with torch.no_grad():
        for key, parameter in expected.items():
            parameter.copy_(tensors[key])
    return adapter


def merge(model: nn.Module, files: Mapping[str, bytes]) -> None:
    """Add a PEFT checkpoint's update to the weights of `model`, in float32, and leave it plain.

    Raises:
        ModelError: as in `from_peft`.
    """
    adapter = from_peft(model, files)
    with torch.no_grad():
        for layer in adapter.layers.values():
            update = (layer.lora_b @ layer.lora_a).mul_(layer.scaling)
            layer.weight.copy_(update.add_(layer.weight))
    detach(adapter)


def _config_of(fields: Mapping[str, object], blocks: int) -> LoraConfig:
    """Read the part of PEFT's configuration that we write; refuse what changes the formula."""
    unknown = [name for name in _PEFT_REFUSED if fields.get(name)]
    if fields["peft_type"] != "LORA" or fields.get("bias", "none") != "none" or unknown:
        raise ValueError(f"only plain LoRA can be read, this one has {unknown or fields}")
    config = LoraConfig(
        rank=int(str(fields["r"])),
        alpha=float(str(fields["lora_alpha"])),
        targets=_names(fields["target_modules"]),
    )
    chosen = fields.get("layers_to_transform")
    if chosen is None:
        return config
    if not isinstance(chosen, list) or not chosen or chosen != list(range(blocks))[-len(chosen) :]:
        raise ValueError(f"layers_to_transform is not the last blocks of this model: {chosen}")
    return replace(config, last_layers=len(chosen))


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"target_modules is no list of names: {value!r}")
    return tuple(sorted(value))


def _start(layer: LoRALinear, generator: torch.Generator) -> None:
    """Give the factors other than zero their start."""
    if layer.core is None:
        a = torch.empty(layer.lora_a.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    else:
        a, b = frozen_factors(layer.weight, len(layer.core))
        layer.lora_b.data.copy_(b)
    layer.lora_a.data.copy_(a)
