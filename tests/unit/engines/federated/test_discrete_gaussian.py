"""Discrete Gaussian noise against its definition; false alarms: below 1e-6 for each test."""

from __future__ import annotations

import os

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
