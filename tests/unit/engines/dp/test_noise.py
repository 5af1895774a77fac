"""The Gaussian noise; alarms are false with the stated probability, here over fresh keys."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from llmos.engines.dp.noise import add_gaussian
from llmos.engines.dp.randomness import Purpose, Randomness

FALSE_ALARM = 1e-9  # of each statistical test


def noise(count: int, std: float = 1.0, *, randomness: Randomness | None = None) -> torch.Tensor:
    total = torch.zeros(count)
    add_gaussian(total, std, (randomness or Randomness.fresh()).stream(Purpose.NOISE, 0))
    return total


@pytest.mark.parametrize("std", [0.01, 1.0, 37.0])
def test_standard_deviation_lies_within_chi_square_bounds(std: float) -> None:
    count = 400_000
    sum_of_squares = float(noise(count, std).double().square().sum()) / std**2
    low, high = stats.chi2(count).ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2])
    assert low < sum_of_squares < high


def test_distribution_is_normal() -> None:
    """Kolmogorov-Smirnov against the normal distribution."""
    assert stats.kstest(noise(200_000).numpy(), "norm").pvalue > FALSE_ALARM


def test_mean_is_zero_and_pairs_are_independent() -> None:
    count = 200_000
    draws = noise(count).double()
    bound = stats.norm.isf(FALSE_ALARM / 2) / math.sqrt(count)
    half = count // 2
    assert abs(float(draws.mean())) < bound
    for other in (draws[half:], draws.roll(1)[:half]):
        product = float((draws[:half] * other).mean())
        assert abs(product) < bound * math.sqrt(2) * 1.1  # the product is not quite normal


def test_tail_is_there() -> None:
    """P(no draw beyond 4 sigma in 2e6) = exp(-127); P(more than 220) < 1e-12."""
    beyond = int((noise(2_000_000).abs() > 4).sum())
    assert 40 < beyond < 220


@pytest.mark.parametrize("count", [1, 2, 3, (1 << 19) - 1, (1 << 19) + 1])
def test_every_coordinate_gets_noise_of_its_own(count: int) -> None:
    draws = noise(count)
    assert bool((draws != 0).all())
    assert len(set(draws.tolist())) > 0.9 * count


def test_noise_is_added_and_not_written() -> None:
    seeded = Randomness.insecure_test(0)
    total = torch.full((1000,), 100.0)
    add_gaussian(total, 1.0, seeded.stream(Purpose.NOISE, 0))
    torch.testing.assert_close(total - 100, noise(1000, randomness=seeded), atol=1e-5, rtol=0)


def test_same_seed_same_noise() -> None:
    seeded = Randomness.insecure_test(5)
    assert torch.equal(noise(999, randomness=seeded), noise(999, randomness=seeded))
    assert not torch.equal(noise(999), noise(999))
