"""Discrete Gaussian noise: integers k with probability proportional to exp(-k^2 / (2 std^2)).

Canonne, Kamath, Steinke 2020 (arXiv:2004.00010), Algorithms 2 and 3: a two-sided geometric
variable, accepted with a probability that makes it Gaussian. It is exact, as theirs is: a uniform
is a real number of which 53 bits are drawn first. Where these and the error of float64 arithmetic
leave a comparison open, about once in 10^8, more bits are drawn and decimals of as many digits as
it takes decide. Comparisons in float64 alone are 25 times as fast as rationals and so is this.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable
from decimal import Decimal
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

Words = Callable[[int], NDArray[np.uint64]]  # so many uniform words of a cryptographic stream
Floats = NDArray[np.float64]
Answer = TypeVar("Answer")

GREATEST_STD: Final = 2.0**40  # 37 times as much is still exact in float64
_CHUNK: Final = 1 << 16  # proposals worked on at once: 512 KiB in float64
_BITS: Final = 53  # of a uniform at first
_CELL: Final = 2.0**-_BITS
_ERROR: Final = 2.0**-48  # relative, of a few operations, log and exp in float64: 16 ulp
_DIGITS_PER_WORD: Final = 20


def sample(count: int, std: float, words: Words) -> NDArray[np.int64]:
    """Return `count` independent discrete Gaussian integers.

    Raises:
        ValueError: `std` is not above 0, or above 2^40.
    """
    if not 0 < std <= GREATEST_STD:
        raise ValueError(f"a discrete Gaussian of standard deviation {std} cannot be drawn")
    noise = np.empty(count, dtype=np.int64)
    done = 0
    while done < count:
        found = _accepted(min(_CHUNK, 2 * (count - done) + 8), std, words)[: count - done]
        noise[done : done + found.size] = found
        done += found.size
    return noise


def _accepted(proposals: int, std: float, words: Words) -> NDArray[np.int64]:
    """Return those of so many proposals that are accepted, about two thirds."""
    scale = math.floor(std) + 1
    first = words(proposals)
    negative = (first & np.uint64(1)).astype(bool)  # a bit that the uniform leaves out
    magnitude = _geometric(first >> np.uint64(64 - _BITS), scale, words)
    kept = _below_bell(words(proposals) >> np.uint64(64 - _BITS), magnitude, std, scale, words)
    kept &= ~(negative & (magnitude == 0))  # zero has one sign only
    magnitude[negative] *= -1
    drawn: NDArray[np.int64] = magnitude[kept].astype(np.int64)
    return drawn


def _geometric(cells: NDArray[np.uint64], scale: int, words: Words) -> Floats:
    """Return floor(-scale log u) for uniforms u in [cell, cell + 1] / 2^53."""
    lower = -scale * np.log((cells + np.uint64(1)) * _CELL)
    with np.errstate(divide="ignore"):
        upper = lower + scale / cells.astype(np.float64)  # log((k + 1) / k) <= 1 / k
    found: Floats = np.floor(lower * (1 - _ERROR))
    for place in np.flatnonzero(found != np.floor(upper * (1 + _ERROR))):
        found[place] = _decided(int(cells[place]), words, lambda u: math.floor(-scale * u.ln()))
    return found


def _below_bell(
    cells: NDArray[np.uint64], magnitude: Floats, std: float, scale: int, words: Words
) -> NDArray[np.bool_]:
    """Return whether uniforms are below exp(-(magnitude - std^2 / scale)^2 / (2 std^2))."""
    exponent = (magnitude - std**2 / scale) ** 2 / (2 * std**2)
    height = np.exp(-exponent)
    error = height * (_ERROR * (1 + exponent))
    kept: NDArray[np.bool_] = (cells + np.uint64(1)) * _CELL <= height - error
    open_ = ~kept & (cells * _CELL <= height + error)  # also where the height is below 1e-308
    for place in np.flatnonzero(open_):
        away = int(magnitude[place])

        def below(uniform: Decimal, away: int = away) -> bool:
            variance = Decimal(std) ** 2
            return uniform.ln() < -((away - variance / scale) ** 2) / (2 * variance)

        kept[place] = _decided(int(cells[place]), words, below)
    return kept


def _decided(cell: int, words: Words, decide: Callable[[Decimal], Answer]) -> Answer:
    """Draw more bits of a uniform until all that it may be is decided alike.

    `decide` is monotone. It is asked a cell below and a cell above: so far apart that rounding,
    with twice as many digits as there are bits for, cannot reach into the uniform's own cell.
    """
    bits = _BITS
    while True:
        cell, bits = cell << 64 | int(words(1)[0]), bits + 64
        if cell <= 1:  # the logarithm has no end there
            continue
        with decimal.localcontext(prec=2 * _DIGITS_PER_WORD * (bits // 64 + 1)):
            size = Decimal(2) ** bits
            below, above = decide((cell - 1) / size), decide((cell + 2) / size)
        if below == above:
            return below
