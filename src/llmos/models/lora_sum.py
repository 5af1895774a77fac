"""Two adapters of one model become one: a sum of low-rank updates is a low-rank update.

s1 B1 A1 + s2 B2 A2 = [s1 B1, s2 B2] [A1; A2], which has rank r1 + r2 and scale 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmos.models.lora import LoraAdapter, LoraConfig, LoRALinear, attach, detach, from_peft


def add(adapter: LoraAdapter, files: Mapping[str, bytes]) -> LoraAdapter:
    """Put an adapter in the place of `adapter` that does what it and a PEFT checkpoint do together.

    It covers every layer that one of the two adapts; what only one adapts is zero in the other's
    share of the rank. The base weights stay as they are.

    Raises:
        ModelError: as in `from_peft`; the model is then left plain.
    """
    detach(adapter)
    earlier = from_peft(adapter.model, files)
    detach(earlier)
    parts = (earlier, adapter)
    total = attach(adapter.model, _union(parts), seed=0)
    with torch.no_grad():
        for path, layer in total.layers.items():
            _fill(layer, [(part.layers.get(path), part.config.rank) for part in parts])
    return total


def _union(parts: tuple[LoraAdapter, ...]) -> LoraConfig:
    """Return the configuration of an adapter with room for all of these side by side."""
    rank = sum(part.config.rank for part in parts)
    every = any(part.config.last_layers is None for part in parts)
    return LoraConfig(
        rank=rank,
        alpha=float(rank),
        targets=tuple(sorted({path.rpartition(".")[2] for part in parts for path in part.layers})),
        last_layers=None if every else max(len(part.adapted_blocks) for part in parts),
    )


def _fill(layer: LoRALinear, parts: list[tuple[LoRALinear | None, int]]) -> None:
    """Write factors side by side into a layer of scale 1; a part that has none is zero there."""
    layer.lora_a.zero_()
    start = 0
    for part, rank in parts:
        end = start + rank
        if part is not None:
            layer.lora_a[start:end].copy_(part.lora_a)
            layer.lora_b[:, start:end].copy_(_scaled(part))
        start = end


def _scaled(layer: LoRALinear) -> Tensor:
    """Return s B (out, rank) of a layer."""
    return layer.up * layer.scaling
