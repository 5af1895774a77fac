"""How much noise an epsilon takes: a search, outside of the trusted base.

What it finds is proven by `kernel.accounting` before anyone relies on it, and charged by what was
run; a fault here can cost money, never privacy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Final

from llmos.errors import InvalidPrivacyParameter
from llmos.kernel import accounting
from llmos.privacy import (
    Mechanism,
    Neighboring,
    PoissonSampledGaussian,
    check_delta,
    check_epsilon,
)

_GREATEST_NOISE: Final = 1e6
_FIRST_FACTOR: Final = 1.1  # searches widen by 1.1, 1.21, 1.46 ...
_SEARCH_TOLERANCE: Final = 1.001  # ratio of the two ends at which a search for noise stops
_SIGNIFICANT_DIGITS: Final = 4


@lru_cache(maxsize=1024)
def calibrate_noise(sampling_probability: float, steps: int, epsilon: float, delta: float) -> float:
    """Return the smallest noise multiplier, to four digits, for which the epsilon is proven.

    The search uses a coarse privacy loss distribution; its result is rounded up and verified with
    the fine one, so the returned noise never costs more than `epsilon`.

    Raises:
        InvalidPrivacyParameter: a parameter is out of range, or no noise up to 1e6 suffices.
    """
    check_epsilon(epsilon)
    check_delta(delta)
    if steps < 1:
        raise InvalidPrivacyParameter("steps", steps, "1 or more")

    def at(noise: float) -> Mechanism:
        return PoissonSampledGaussian(sampling_probability, noise, steps)

    interval = max(accounting.FINE_INTERVAL, 1e-3 * min(epsilon, 1.0), 1e-4 * epsilon)

    def coarse_suffices(noise: float) -> bool:
        add_or_remove = Neighboring.ADD_OR_REMOVE_ONE
        return accounting.pld_epsilon(at(noise), delta, add_or_remove, interval) <= epsilon

    start = least_noise(lambda noise: accounting.quick_epsilon(at(noise), delta) <= epsilon)
    noise = least_noise(coarse_suffices, start=start)
    while noise <= _GREATEST_NOISE:
        noise = round_up(noise)
        if accounting.epsilon(at(noise), delta) <= epsilon:
            return noise
        noise *= 1.002
    raise InvalidPrivacyParameter("epsilon", epsilon, "large enough for noise that can be computed")


def least_noise(suffices: Callable[[float], bool], *, start: float = 1.0) -> float:
    """Return the smallest noise multiplier that suffices, to 0.1 %; infinity if none up to 1e6.

    `suffices` must be true from some noise on. The search is fast when `start` is near.
    """
    low = high = min(max(start, accounting.LEAST_NOISE), _GREATEST_NOISE)
    factor = _FIRST_FACTOR
    while not suffices(high):
        if high == _GREATEST_NOISE:
            return math.inf
        low, high, factor = high, min(high * factor, _GREATEST_NOISE), factor * factor
    while low == high or suffices(low):
        low, high, factor = low / factor, low, factor * factor
    while high / low > _SEARCH_TOLERANCE:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high


def round_up(noise: float) -> float:
    """Round up to four significant digits, so that the number can be read and typed."""
    return _rounded(noise, math.ceil)


def round_down(epsilon: float) -> float:
    """Round down to four significant digits; zero stays zero."""
    return _rounded(epsilon, math.floor) if epsilon > 0 else 0.0


def _rounded(value: float, to_integer: Callable[[float], int]) -> float:
    unit = 10.0 ** (math.floor(math.log10(value)) + 1 - _SIGNIFICANT_DIGITS)
    return float(f"{to_integer(value / unit) * unit:.{_SIGNIFICANT_DIGITS}g}")
