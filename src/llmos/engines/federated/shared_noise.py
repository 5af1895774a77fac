"""Noise of which each site adds a share: the sum is private, no single site's vector has to be.

The distributed discrete Gaussian mechanism (Kairouz, Liu, Steinke 2021, arXiv:2102.06387): clipped
sums are rounded to a grid, each site adds discrete Gaussian noise, and secure aggregation adds all
of it mod 2^32. Where `honest` sites at least stand in every sum, noise of standard deviation
multiplier x sensitivity is in it, although each adds only 1 / sqrt(honest) of that. Differences to
the paper: the grid is so fine that its rounding costs 0.8 % of noise in the worst case, so that no
rotation and no conditional rounding are needed.

Why the accountant of the sampled *continuous* Gaussian holds, at every order and for its privacy
loss distribution: (1) a sum of discrete Gaussians is one up to a factor exp(+-tau) in every
probability, tau = 10 (honest - 1) exp(-pi^2 std^2) an entry (their Theorem 1); (2) a discrete
Gaussian of variance v is what a continuous one of variance v - r^2 becomes under a random rounding
that looks at no data, up to a factor 1 +- 4 exp(-pi^2 r^2) an entry (Peikert 2010, CRYPTO, section
3, with a continuous first step; docs/design/003). With r = 8 and std >= 16 all factors of 10^9
entries and 10^6 steps together differ from 1 by less than 1e-250; mixtures over sampled batches
keep them. The sampler draws exactly these integers (`discrete_gaussian.py`), and the rounding to
the grid is paid for by `sensitivity`. Not covered: float32, in which a clipped sum is added up, in
an order that depends on the batch, as in any training (engines/dp/README.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from llmos.engines.federated import discrete_gaussian
from llmos.engines.federated.discrete_gaussian import Words
from llmos.engines.federated.fixed_point import FixedPoint
from llmos.engines.federated.packing import MAX_BITS
from llmos.errors import EngineError, InvalidPrivacyParameter

LEAST_STD: Final = 16.0  # of one site's noise, in steps of the grid
_LEAST_HONEST: Final = 2  # of one, its own noise alone protects it
_FINENESS: Final = 128.0  # what rounding can add to the sensitivity: 1 / 128 of it
_ROUNDING_STD: Final = 8.0  # r above: the variance that the continuous Gaussian lacks is r^2
_TAIL: Final = 16.0  # standard deviations of noise that must fit into the sum's range


@dataclass(frozen=True, slots=True)
class SharedNoise:
    """What the sites of one job agree on."""

    clip_norm: float  # L2 bound of one unit's part of a site's sum
    multiplier: float  # noise of the sum of `honest` sites / (clip_norm and rounding)
    honest: int  # sites in every sum that follow the protocol
    entries: int
    sites: int  # at most this many are added

    def __post_init__(self) -> None:
        """Refuse noise that hides nothing, and noise that the words of a sum do not hold."""
        for name in ("clip_norm", "multiplier"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InvalidPrivacyParameter(name, value, "a finite number above 0")
        if not _LEAST_HONEST <= self.honest <= self.sites:
            raise InvalidPrivacyParameter(
                "honest", self.honest, f"{_LEAST_HONEST} or more, at most the {self.sites} sites"
            )
        greatest = 2.0 ** (MAX_BITS - 2) / (_TAIL * math.sqrt(self.sites))
        if not LEAST_STD <= self.std <= greatest:
            raise InvalidPrivacyParameter(
                "multiplier",
                self.multiplier,
                f"such that the noise has {LEAST_STD:g} to {greatest:.3g} steps of the grid",
            )

    @property
    def step(self) -> float:
        """Return the distance of neighbouring numbers of the grid."""
        return self.clip_norm / (_FINENESS * math.sqrt(self.entries))

    @property
    def sensitivity(self) -> float:
        """Return how far one unit moves a rounded sum at most, in L2 norm and steps of the grid.

        Each entry of the difference of two rounded vectors is less than 1 away from the difference
        of the vectors, so that the norm grows by sqrt(entries) at most.
        """
        return self.clip_norm / self.step + math.sqrt(self.entries)

    @property
    def std(self) -> float:
        """Return the standard deviation of one site's noise, in steps of the grid."""
        needed = (self.multiplier * self.sensitivity) ** 2 + _ROUNDING_STD**2
        return math.sqrt(needed / self.honest)

    @property
    def fixed(self) -> FixedPoint:
        """Return how the coordinator reads a sum: words of 32 bits, whatever the number of sites.

        >>> SharedNoise(1.0, 1.0, 2, 10_000, 3).fixed.modulus_bits
        32
        """
        bits = MAX_BITS - (self.sites - 1).bit_length()
        return FixedPoint(self.step * float(2 ** (bits - 1) - 1), bits, self.sites)

    def to_residues(self, total: NDArray[np.float32], words: Words) -> NDArray[np.uint32]:
        """Return a site's clipped sum (P,), rounded and with its share of the noise, mod 2^32.

        Entries beyond this site's part of half the range are cut off first, which moves two vectors
        no further apart; what noise adds wraps around, which is an operation on the sum.

        Raises:
            EngineError: the sum has another shape, or is not finite.
        """
        if total.shape != (self.entries,) or not np.isfinite(total).all():
            raise EngineError("a clipped sum does not fit its job, or is not finite")
        most = float(2 ** (MAX_BITS - 2) // self.sites)
        grid = np.clip(np.rint(total.astype(np.float64) / self.step), -most, most).astype(np.int64)
        grid += discrete_gaussian.sample(self.entries, self.std, words)
        return grid.astype(np.uint32)
