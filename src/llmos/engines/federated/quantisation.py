"""Block quantisation to 8 or 4 bits with error feedback (Karimireddy et al., arXiv:1901.09847).

Entries are rounded to the nearest level, not stochastically. What rounding leaves out of a round is
added to the next one (their Algorithm 2, EF-SGD), so that an unbiased rounding would buy nothing
and cost twice the squared error on average. Nearest rounding is what their Assumption A asks for:
in each block the largest entry is exact and no error is larger than its entry, hence
||C(x) - x||^2 <= (1 - 1/block) ||x||^2.

Error feedback is not for updates under differential privacy unless their sensitivity is shown
anew: a residual carries what one round clipped or noised into the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

BLOCK: Final = 256  # entries that share a scale
BITS: Final = (4, 8)
_TINY: Final = np.finfo(np.float32).tiny  # of normal numbers: the division below stays exact


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """A quantised vector; entry i is code i times the scale of its block."""

    scales: NDArray[np.float32]  # one a block
    codes: NDArray[np.int8]  # (P,), each within +-levels(bits)
    bits: int

    @property
    def vector(self) -> NDArray[np.float32]:
        """Return the vector (P,) that these blocks stand for."""
        padded = _blocks(self.codes.astype(np.float32)) * self.scales[:, None]
        return padded.reshape(-1)[: self.codes.size]


def levels(bits: int) -> int:
    """Return the largest code; codes are symmetric about 0.

    >>> levels(4), levels(8)
    (7, 127)
    """
    return int(2 ** (bits - 1) - 1)


def quantise(
    update: NDArray[np.float32], residual: NDArray[np.float32] | None = None, *, bits: int
) -> tuple[Blocks, NDArray[np.float32]]:
    """Quantise `update` + `residual` and return it with the residual for the next round.

    Args:
        update: (P,), finite.
        residual: what the rounds before left out; None in the first one.
        bits: of a code, 4 or 8.

    Raises:
        ValueError: the sum is not finite, or no such quantisation exists.
    """
    if bits not in BITS:
        raise ValueError(f"codes have 4 or 8 bits, not {bits}")
    wanted = update if residual is None else update + residual
    blocks = _blocks(wanted)
    scales = np.abs(blocks).max(axis=1, initial=0) / np.float32(levels(bits))
    if not np.isfinite(scales).all():
        raise ValueError("an update has an entry that is not finite")
    # a block of zeros, or of numbers too small to divide by, is left to the residual
    scales[scales < _TINY] = 0
    divisors = np.where(scales > 0, scales, np.float32(np.inf))
    codes = np.rint(blocks / divisors[:, None]).astype(np.int8).reshape(-1)[: wanted.size]
    quantised = Blocks(scales, codes, bits)
    return quantised, wanted - quantised.vector


def blocks_of(entries: int) -> int:
    """Return how many blocks hold this many entries."""
    return -(-entries // BLOCK)


def _blocks(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the vector as rows of one block, the last one filled with zeros."""
    padded = np.zeros(blocks_of(vector.size) * BLOCK, dtype=np.float32)
    padded[: vector.size] = vector
    return padded.reshape(-1, BLOCK)
