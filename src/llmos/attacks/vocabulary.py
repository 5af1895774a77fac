"""What every token of a vocabulary looks like to the first adapted layers of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmos.errors import MeasurementError
from llmos.models.lora import LoraAdapter

_CHUNK: Final = 4096  # tokens in one pass
_TRIED: Final = 16  # tokens on which a layer's independence of position is tried
_TOLERANCE: Final = 1e-2  # relative; the formats' rounding is below, an attention's mixture above


@dataclass(frozen=True, slots=True)
class TokenLayer:
    """An adapted layer whose input depends on nothing but the token at its position."""

    name: str
    span: slice  # of its trained factor in an update (P,)
    rank: int

    def matrix(self, update: NDArray[Any]) -> NDArray[np.float64]:
        """Cut the layer's (rows, rank) matrix out of an update (P,)."""
        return update[self.span].reshape(-1, self.rank).astype(np.float64)


class _EnoughSeen(Exception):
    """Every layer that is looked at has got its input: no error, it ends a pass early."""


def token_layers(adapter: LoraAdapter) -> tuple[TokenLayer, ...]:
    """Find the layers to attack: those of the first block that see the token alone.

    They are found by what they do, not by their names: the tokens of a sequence must enter them as
    each does by itself.

    Raises:
        MeasurementError: block 0 was not trained, or no layer of it is like this.
    """
    if adapter.adapted_blocks.start != 0:
        raise MeasurementError(
            f"blocks {adapter.adapted_blocks.start} and up were trained: what enters them is mixed "
            "from many tokens, so this attack does not apply",
            hint="it is for jobs without `last_layers`",
        )
    first = [name for name in adapter.layers if name.startswith(f"{adapter.blocks}.0.")]
    ids = torch.arange(min(_TRIED, _size(adapter)))
    together = _inputs(adapter, first, ids[None])
    alone = _inputs(adapter, first, ids[:, None])
    chosen = [
        name
        for name in first
        if _error(together[name].flatten(0, 1), alone[name].flatten(0, 1)) < _TOLERANCE
    ]
    if not chosen:
        raise MeasurementError(
            "what enters the first adapted layers depends on more than the token: this attack does "
            "not apply to models of this kind"
        )
    return tuple(_layer(adapter, name) for name in chosen)


def token_vectors(
    adapter: LoraAdapter, layers: Sequence[TokenLayer]
) -> tuple[NDArray[np.float64], ...]:
    """Return of each layer (V, rank): A x_v for every token v, as the coordinator computes it."""
    names = [layer.name for layer in layers]
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    every = torch.arange(_size(adapter))
    for first in range(0, len(every), _CHUNK):
        ids = every[first : first + _CHUNK]
        for name, inputs in _inputs(adapter, names, ids[:, None]).items():
            a = adapter.layers[name].lora_a.float()
            parts[name].append((inputs.flatten(0, 1).float() @ a.T).double().cpu())
    return tuple(np.asarray(torch.cat(parts[name]).numpy()) for name in names)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Let a model compute in float32 inside the block; widening and narrowing again is exact."""
    narrow = {p: p.dtype for p in model.parameters() if p.dtype != torch.float32}
    for parameter in narrow:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in narrow.items():
            parameter.data = parameter.data.to(dtype)


def _size(adapter: LoraAdapter) -> int:
    embeddings = adapter.model.get_input_embeddings()  # type: ignore[operator]
    return int(embeddings.weight.shape[0])


def _layer(adapter: LoraAdapter, name: str) -> TokenLayer:
    start = 0
    for path, layer in adapter.layers.items():
        end = start + sum(factor.numel() for factor in layer.trained)
        if path == name:
            return TokenLayer(name, slice(start, end), adapter.config.rank)
        start = end
    raise KeyError(name)


def _inputs(adapter: LoraAdapter, names: Sequence[str], ids: Tensor) -> dict[str, Tensor]:
    """Return what enters some layers (B, T, in) when the model reads `ids` (B, T), and no more."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Any:  # noqa: ANN401 - a hook
        def hook(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = inputs[0].detach()
            if len(seen) == len(names):
                raise _EnoughSeen

        return hook

    handles = [adapter.layers[name].register_forward_pre_hook(watch(name)) for name in names]
    device = next(adapter.model.parameters()).device
    try:
        with torch.no_grad(), suppress(_EnoughSeen):
            adapter.model(input_ids=ids.to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _error(got: Tensor, wanted: Tensor) -> float:
    """Return the largest relative difference between rows (N, in)."""
    difference = (got.float() - wanted.float()).norm(dim=1)
    return float((difference / wanted.float().norm(dim=1).clamp(min=1e-12)).amax())
