"""A lower bound on epsilon from one training run with coin-flipped canaries."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from llmos.errors import MeasurementError

CONFIDENCE: Final = 0.95
LARGEST_EPSILON: Final = 50.0  # above this no count of canaries that fits a machine says more
BISECTIONS: Final = 60


@dataclass(frozen=True, slots=True)
class EpsilonBound:
    """With `confidence`, the run was not (epsilon, delta)-DP for any epsilon below `lower`."""

    lower: float  # nats; 0 says nothing
    confidence: float
    canaries: int  # coins thrown
    guesses: int  # fixed before any score was seen; the other canaries are abstained on
    correct: int
    delta: float


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Bound the chance of at least `correct` right guesses against any (epsilon, delta)-DP run.

    Source: Steinke, Nasr, Jagielski 2023, arXiv:2305.08846, Theorem 5.2 and Algorithm 1: the count
    of right guesses is dominated by Binomial(guesses, e^eps / (1 + e^eps)) but for a term in delta.
    """
    right = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, right))
    if delta == 0 or correct == 0:
        return tail
    below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, right))
    slope = float(np.max(below / np.arange(1, correct + 1)))
    return min(1.0, tail + 2 * canaries * delta * slope)


def epsilon_lower_bound(
    canaries: int, guesses: int, correct: int, delta: float, *, confidence: float = CONFIDENCE
) -> float:
    """Return the largest epsilon that `correct` right guesses refute, 0 when they refute none.

    Raises:
        MeasurementError: the counts contradict each other or delta is no probability.
    """
    if not (0 <= correct <= guesses <= canaries and 0 <= delta < 1 and 0 < confidence < 1):
        raise MeasurementError(
            f"{correct} right of {guesses} guesses over {canaries} canaries at delta {delta} and "
            f"confidence {confidence} cannot be"
        )
    rejected, kept = 0.0, LARGEST_EPSILON
    if p_value(canaries, guesses, correct, rejected, delta) > 1 - confidence:
        return 0.0
    for _ in range(BISECTIONS):
        middle = (rejected + kept) / 2
        if p_value(canaries, guesses, correct, middle, delta) <= 1 - confidence:
            rejected = middle
        else:
            kept = middle
    return rejected


def guess_count(canaries: int) -> int:
    """Return how many of the canaries are guessed on: half, rounded down to an even number.

    The count depends on nothing but the number of coins, so it is fixed before any score is seen;
    trying several and keeping the best would void the confidence.
    """
    return canaries // 4 * 2


def one_run_bound(
    scores: NDArray[np.float64], planted: NDArray[np.bool_], delta: float
) -> EpsilonBound:
    """Guess `planted` for the highest scores and `not planted` for the lowest, and bound epsilon.

    Equal scores are ranked to the auditor's disadvantage: that can only lower the number of right
    guesses below that of a rule blind to the coins, so the bound stays valid in any input order.

    Args:
        scores: (m,) higher means more likely planted.
        planted: (m,) the coins, independent and fair, thrown before training.
        delta: the delta of the guarantee that the bound is to be compared with.

    Raises:
        MeasurementError: a score is not a number, or the lengths differ.
    """
    if scores.shape != planted.shape or scores.ndim != 1:
        raise MeasurementError(f"{scores.shape} scores do not fit {planted.shape} coins")
    if np.isnan(scores).any():
        raise MeasurementError("a canary's score is not a number")
    guesses = guess_count(len(scores))
    order = np.lexsort((planted, -scores))  # among equals: unplanted first, planted last
    half = guesses // 2
    said_in, said_out = order[:half], order[len(order) - half :]
    correct = int(planted[said_in].sum() + (~planted[said_out]).sum())
    return EpsilonBound(
        lower=epsilon_lower_bound(len(scores), guesses, correct, delta),
        confidence=CONFIDENCE,
        canaries=len(scores),
        guesses=guesses,
        correct=correct,
        delta=delta,
    )
