"""Gaussian noise from a cryptographic stream (Box and Muller 1958), computed in float64."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from llmos.engines.dp.randomness import Stream

_BLOCK_PAIRS: Final = 1 << 18  # two normals each: 4 MiB of words, small enough for the cache
_FRACTION_BITS: Final = 53  # of a float64 in [0, 1)


def add_gaussian(total: Tensor, std: float, stream: Stream) -> None:
    """Add independent N(0, std^2) noise to every coordinate of `total` (P,), in place.

    Words become uniforms of 53 bits, so that the largest draw is 8.6 standard deviations; the sum
    is rounded once, to `total`'s float32.
    """
    size = total.numel()
    for start in range(0, size, 2 * _BLOCK_PAIRS):
        count = min(2 * _BLOCK_PAIRS, size - start)
        noise = _normals((count + 1) // 2, stream)[:count].mul_(std).to(total.device)
        part = total[start : start + count]
        part.copy_(noise.add_(part))


def _normals(pairs: int, stream: Stream) -> Tensor:
    """Return 2 x `pairs` standard normals in float64."""
    words = torch.from_numpy((stream.words(2 * pairs) >> (64 - _FRACTION_BITS)).view("int64"))
    uniform = words.double()
    radius = uniform[:pairs].add_(0.5).mul_(2.0**-_FRACTION_BITS).log_().mul_(-2).sqrt_()
    angle = uniform[pairs:].mul_(2 * math.pi * 2.0**-_FRACTION_BITS)
    normals = torch.empty_like(uniform)
    torch.mul(radius, angle.cos(), out=normals[:pairs])
    torch.mul(radius, angle.sin_(), out=normals[pairs:])
    return normals
