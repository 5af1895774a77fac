"""Real numbers as integers mod 2^k, whose sums over the sites are exact.

A site multiplies its update by its weight, cuts it off at +-`limit`, and rounds it to `bits` bits;
k has room for the sum of all sites, so that nothing wraps around. Everything but the update and
the weight is public and the same at every site.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from llmos.engines.federated.packing import MAX_BITS

_CHUNK: Final = 1 << 16  # entries worked on at once: 512 KiB in float64


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """How updates become integers: range, precision and the number of summands."""

    limit: float  # entries times weight beyond +-limit are cut off
    bits: int  # of one site's entry, sign included
    sites: int  # at most this many are added

    def __post_init__(self) -> None:
        """Refuse what does not fit into words of 32 bits."""
        if not (math.isfinite(self.limit) and self.limit > 0 and self.sites >= 1):
            raise ValueError("a fixed-point range is finite and above 0, for one site or more")
        if self.bits <= 1 or self.modulus_bits > MAX_BITS:
            raise ValueError(f"{self.bits} bits of {self.sites} sites do not fit {MAX_BITS} bits")

    @property
    def modulus_bits(self) -> int:
        """Return k = bits + ceil(log2(sites)).

        >>> FixedPoint(limit=1.0, bits=16, sites=5).modulus_bits
        19
        """
        return self.bits + (self.sites - 1).bit_length()

    @property
    def step(self) -> float:
        """Return the distance of neighbouring numbers."""
        return self.limit / float(2 ** (self.bits - 1) - 1)


def fresh_generator() -> np.random.Generator:
    """Return a generator for stochastic rounding, seeded by the operating system.

    Rounding needs no cryptographic stream: the masks hide the result, not the rounding.
    """
    return np.random.Generator(np.random.SFC64(int.from_bytes(os.urandom(32), "big")))


def to_residues(
    update: NDArray[np.float32],
    fixed: FixedPoint,
    generator: np.random.Generator,
    *,
    weight: float = 1.0,
) -> NDArray[np.uint32]:
    """Return `weight` x `update` (P,) as integers mod 2^k, rounded up or down at random, unbiased.

    Raises:
        ValueError: the update or the weight is not finite.
    """
    if not (weight > 0 and math.isfinite(factor := weight / fixed.step)):
        raise ValueError(f"a site's weight is finite and above 0, not {weight}")
    most = 2 ** (fixed.bits - 1) - 1
    residues = np.empty(update.size, dtype=np.uint32)
    for start in range(0, update.size, _CHUNK):
        part = update[start : start + _CHUNK].astype(np.float64)
        if not np.isfinite(part).all():
            raise ValueError("an update has an entry that is not finite")
        part *= factor
        part += generator.random(part.size)
        np.floor(part, out=part)
        np.clip(part, -most, most, out=part)
        residues[start : start + _CHUNK] = part.astype(np.int64).astype(np.uint32)
    residues &= np.uint32(2**fixed.modulus_bits - 1)
    return residues


def from_residues(total: NDArray[np.uint32], fixed: FixedPoint) -> NDArray[np.float64]:
    """Return the sum of weighted updates (P,) that the sum mod 2^k stands for."""
    spare = np.uint32(MAX_BITS - fixed.modulus_bits)
    # the sign is the highest of k bits: moved to the highest of 32, it spreads on the way back
    signed = (total << spare).view(np.int32) >> spare.astype(np.int32)
    return signed.astype(np.float64) * fixed.step


def saturation(update: NDArray[np.float32], fixed: FixedPoint, *, weight: float = 1.0) -> float:
    """Return the fraction of entries that the range cuts off; it comes from the site's data."""
    return float(np.mean(np.abs(update) * weight > fixed.limit)) if update.size else 0.0
