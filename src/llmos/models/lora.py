"""Low-rank adapters on the linear layers of a frozen model, in the file format of PEFT.

An adapted layer computes y = x W^T + b + s (x A^T) B^T with s = alpha / rank, where W and b stay
frozen in the base model's dtype and A, B are float32 (Hu et al. 2021, arXiv:2106.09685).
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import linear

from llmos.errors import ModelError, UnsupportedModel

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


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Which linear layers get an adapter, and of what size."""

    rank: int = 16
    alpha: float = 32.0  # the update is scaled by alpha / rank
    targets: tuple[str, ...] = ()  # last part of the layers' names; () means every linear layer
    last_layers: int | None = None  # adapt only this many blocks, counted from the output

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
    update = linear(linear(x, layer.lora_a.to(x.dtype)), layer.lora_b.to(x.dtype))
    return linear(x, layer.weight, layer.bias).add(update, alpha=layer.scaling)


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update."""

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        """Wrap `base`; B is zero, so that the model is unchanged until A is drawn and B trained."""
        super().__init__()
        device = base.weight.device
        self.base = base
        self.scaling = config.scaling
        self.lora_a = nn.Parameter(torch.zeros(config.rank, base.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device))
        self.product: Product = plain_product

    @property
    def weight(self) -> Tensor:
        """Return the frozen weight (out, in)."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """Return the frozen bias (out,)."""
        return self.base.bias

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
        """Return every A and B; their order defines the layout of `vector`."""
        return [p for layer in self.layers.values() for p in (layer.lora_a, layer.lora_b)]

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

    A is drawn as in PEFT (Kaiming uniform), which needs no secrecy; `seed` repeats the draw.

    Raises:
        UnsupportedModel: the model has no list of blocks with `nn.Linear` layers of these names.
    """
    name, blocks = _blocks(model)
    adapted = range(max(0, len(blocks) - (config.last_layers or len(blocks))), len(blocks))
    chosen = {
        f"{name}.{index}.{path}": module
        for index in adapted
        for path, module in blocks[index].named_modules()
        if isinstance(module, nn.Linear) and _is_target(path, config.targets)
    }
    found = {path.rpartition(".")[2] for path in chosen}
    if not chosen or set(config.targets) - found:
        raise UnsupportedModel(
            f"no linear layers {sorted(set(config.targets) - found) or ''} in {name} of "
            f"{type(model).__name__}",
            hint="choose targets from the names of its nn.Linear layers, such as q_proj",
        )
    model.requires_grad_(requires_grad=False)
    generator = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
    layers = {path: _wrap(model, path, linear, config) for path, linear in chosen.items()}
    for layer in layers.values():
        drawn = torch.empty(layer.lora_a.shape)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        layer.lora_a.data.copy_(drawn)
    return LoraAdapter(model, config, layers, name, adapted)


def detach(adapter: LoraAdapter) -> None:
    """Put the base layers back; the adapter's parameters stay readable."""
    for path, layer in adapter.layers.items():
        adapter.model.set_submodule(path, layer.base)


def to_peft(adapter: LoraAdapter, base_name: str) -> dict[str, bytes]:
    """Write the adapter as the two files of a PEFT checkpoint, by file name."""
    tensors = {}
    for path, layer in adapter.layers.items():
        for part, parameter in (("lora_A", layer.lora_a), ("lora_B", layer.lora_b)):
            tensors[f"{_PEFT_PREFIX}{path}.{part}.weight"] = parameter.detach().cpu().contiguous()
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
        config = _config_of(fields, _block_count(model))
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


def _is_target(path: str, targets: tuple[str, ...]) -> bool:
    return not targets or path.rpartition(".")[2] in targets


def _block_count(model: nn.Module) -> int:
    return len(_blocks(model)[1])


def _blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the model's stack of blocks: its longest module list."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise UnsupportedModel(f"{type(model).__name__} has no list of blocks")
    return max(lists, key=lambda item: len(item[1]))


def _wrap(model: nn.Module, path: str, base: nn.Linear, config: LoraConfig) -> LoRALinear:
    layer = LoRALinear(base, config)
    model.set_submodule(path, layer)
    return layer
