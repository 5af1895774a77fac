"""Discrete Gaussian noise against its definition; false alarms: below 1e-6 for each test."""

from __future__ import annotations

import decimal
import os
from decimal import Decimal

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from llmos.engines.federated.discrete_gaussian import GREATEST_STD, sample

_ALPHA = 1e-6


def words(count: int) -> NDArray[np.uint64]:
    return np.frombuffer(os.urandom(8 * count), dtype=np.uint64)


@pytest.mark.parametrize("std", [0.3, 1.0, 2.7, 19.5])
def test_each_integer_is_as_frequent_as_it_should_be(std: float) -> None:
    count = 200_000
    drawn = sample(count, std, words)
    integers = np.arange(-int(40 * std) - 3, int(40 * std) + 4)
    weights = np.exp(-(integers.astype(float) ** 2) / (2 * std**2))
    expected = count * weights / weights.sum()
    seen = np.array([(drawn == k).sum() for k in integers])
    assert seen.sum() == count
    often = expected > 10
    pooled = [expected[~often].sum()], [seen[~often].sum()]  # the tails, which are one cell
    expected = np.concatenate([expected[often], pooled[0]])
    seen = np.concatenate([seen[often], pooled[1]])
    statistic = ((seen - expected) ** 2 / np.maximum(expected, 1)).sum()
    assert stats.chi2.sf(statistic, len(expected) - 1) > _ALPHA


@pytest.mark.parametrize("std", [300.25, 68_052.8, 2.0**34])
def test_wide_noise_is_gaussian(std: float) -> None:
    drawn = sample(400_000, std, words) / std
    assert stats.kstest(drawn, "norm").pvalue > _ALPHA
    spread = 400_000 * drawn.var()
    assert _ALPHA < stats.chi2.cdf(spread, 400_000) < 1 - _ALPHA


def test_both_signs_are_equally_frequent() -> None:
    drawn = sample(100_000, 1.1, words)
    positive, negative = int((drawn > 0).sum()), int((drawn < 0).sum())
    assert stats.binomtest(positive, positive + negative).pvalue > _ALPHA


@pytest.mark.parametrize("count", [0, 1, 7, 65_537])
def test_as_many_come_as_are_asked_for(count: int) -> None:
    assert sample(count, 5.0, words).shape == (count,)


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), 2 * GREATEST_STD])
def test_noise_that_cannot_be_drawn_is_refused(std: float) -> None:
    with pytest.raises(ValueError, match="cannot be drawn"):
        sample(3, std, words)


class Script:
    """Words that were written down before."""

    def __init__(self, *answers: list[int]) -> None:
        self.answers = list(answers)

    def __call__(self, count: int) -> NDArray[np.uint64]:
        answer = self.answers.pop(0)
        assert len(answer) == count
        return np.array(answer, dtype=np.uint64)


def expansion(value: Decimal) -> tuple[int, int, int]:
    """Return the first 53 binary digits of a number below 1, the next 64, and 64 after them."""
    digits = int(value * 2**181)
    return digits >> 128, digits >> 64 & (2**64 - 1), digits & (2**64 - 1)


PROPOSALS = 10  # that are made at once for one number
ACCEPTED = [0] * PROPOSALS


@pytest.mark.parametrize(
    ("more", "magnitude"),
    [([-1], 1), ([1], 0), ([0, -1], 1), ([0, 1], 0)],  # off the boundary, in the last word drawn
)
def test_a_uniform_at_the_edge_of_two_integers_gets_as_many_bits_as_it_takes(
    more: list[int], magnitude: int
) -> None:
    # std 0.5: floor(-log u) is 0 above 1 / e and 1 below it
    with decimal.localcontext(prec=80):
        cell, *rest = expansion(Decimal(-1).exp())
    far = 2**63  # log u = -0.69: nothing is open about it
    bits = [[word + off * 2**9] for word, off in zip(rest, more, strict=False)]
    words = Script([cell << 11, *[far] * (PROPOSALS - 1)], *bits, ACCEPTED)
    if magnitude == 1:  # its height is exp(-4.5 ** 2 / 8), that of 0 exp(-1 / 8)
        words.answers[-1] = [1 << 40] * PROPOSALS
    assert sample(1, 0.5, words)[0] == magnitude
    assert words.answers == []


@pytest.mark.parametrize(("off", "kept"), [(-1, True), (1, False)])
def test_a_uniform_at_the_height_of_the_bell_gets_as_many_bits_as_it_takes(
    off: int, kept: bool
) -> None:
    # std 0.5, magnitude 0: accepted below exp(-(0 - 1 / 4)^2 / (1 / 2)) = exp(-1 / 8)
    with decimal.localcontext(prec=80):
        cell, more, _ = expansion((Decimal(-1) / 8).exp())
    zero, one = 2**63, 2**62  # magnitudes 0 and 1, nothing open about them
    words = Script(
        [zero, *[one] * (PROPOSALS - 1)],
        [cell << 11, *[1 << 40] * (PROPOSALS - 1)],
        [more + off * 2**9],
    )
    assert sample(1, 0.5, words)[0] == (0 if kept else 1)
    assert words.answers == []


def test_a_uniform_of_nothing_but_zeros_is_drawn_further() -> None:
    # two words more make it 2^-119 and its magnitude 82, accepted by a height of exp(-13366)
    one = 2**62
    words = Script(
        [0, *[one] * (PROPOSALS - 1)],
        [0],
        [2**62],
        [0, *[2**40] * (PROPOSALS - 1)],
        [2**63],
    )
    assert sample(1, 0.5, words)[0] == 1
    assert words.answers == []
