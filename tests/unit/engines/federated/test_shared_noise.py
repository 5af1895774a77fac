"""Shares of noise: what one unit can move, how much noise a sum has, and why its price is right."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from llmos.engines.federated import fixed_point
from llmos.engines.federated.shared_noise import SharedNoise
from llmos.errors import EngineError, InvalidPrivacyParameter

ENTRIES = 40_000
NOISE = SharedNoise(clip_norm=0.5, multiplier=1.1, honest=2, entries=ENTRIES, sites=3)


def words(count: int) -> NDArray[np.uint64]:
    return np.frombuffer(os.urandom(8 * count), dtype=np.uint64)


def signed(residues: NDArray[np.uint32]) -> NDArray[np.int64]:
    return residues.view(np.int32).astype(np.int64)


@given(st.integers(0, 2**32), st.floats(1e-3, 1e3), st.integers(1, 200))
def test_rounding_moves_two_sums_no_further_apart_than_is_paid_for(
    seed: int, clip: float, entries: int
) -> None:
    noise = replace(NOISE, clip_norm=clip, entries=entries)
    generator = np.random.default_rng(seed)
    total = generator.normal(0, 3 * clip, entries)
    direction = generator.normal(0, 1, entries)
    moved = total + direction * clip / np.linalg.norm(direction)
    apart = np.rint(total / noise.step) - np.rint(moved / noise.step)
    assert np.linalg.norm(apart) <= noise.sensitivity


def test_the_sum_of_the_honest_has_all_of_the_noise() -> None:
    # false alarms: 2e-6
    zero = np.zeros(ENTRIES, dtype=np.float32)
    total = sum(signed(NOISE.to_residues(zero, words)) for _ in range(NOISE.honest))
    spread = float((np.asarray(total, dtype=np.float64) ** 2).sum())
    needed = NOISE.multiplier * NOISE.sensitivity
    assert stats.chi2.cdf(spread / needed**2, ENTRIES) > 1e-6
    assert stats.chi2.sf(spread / (1.001 * needed) ** 2, ENTRIES) > 1e-6  # and hardly more


def test_a_share_is_less_than_what_hides_a_unit() -> None:
    alone = NOISE.std / NOISE.sensitivity
    assert alone == pytest.approx(NOISE.multiplier / math.sqrt(2), rel=1e-3)
    assert replace(NOISE, sites=10, honest=6).std < NOISE.std


def test_the_coordinator_reads_the_sum() -> None:
    generator = np.random.default_rng(5)
    sums = [generator.normal(0, 1, ENTRIES).astype(np.float32) for _ in range(3)]
    residues = [NOISE.to_residues(one, words) for one in sums]
    added: NDArray[np.uint32] = np.sum(residues, axis=0, dtype=np.uint32)
    read = fixed_point.from_residues(added, NOISE.fixed)
    noise = math.sqrt(3) * NOISE.std * NOISE.step
    off = (read - np.sum(sums, axis=0, dtype=np.float64)) / noise
    assert stats.kstest(off, "norm").pvalue > 1e-6
    assert NOISE.fixed.modulus_bits == 32
    assert NOISE.fixed.step == pytest.approx(NOISE.step)


def test_what_is_out_of_range_is_cut_off_and_does_not_wrap_around() -> None:
    for sites in (3, 100):
        noise = replace(NOISE, sites=sites, honest=2)
        far = np.full(ENTRIES, 1e30, dtype=np.float32)
        one = noise.to_residues(far, words)
        added: NDArray[np.uint32] = np.multiply(one, np.uint32(sites))
        total = fixed_point.from_residues(added, noise.fixed)
        assert total == pytest.approx(2.0**30 * noise.step, rel=0.02)  # half the range, and noise


@pytest.mark.parametrize("total", [np.zeros(3), np.full(ENTRIES, np.nan), np.full(ENTRIES, np.inf)])
def test_a_sum_of_another_shape_or_without_end_is_refused(total: NDArray[np.float64]) -> None:
    with pytest.raises(EngineError):
        NOISE.to_residues(total.astype(np.float32), words)


@pytest.mark.parametrize(
    "wrong",
    [
        {"clip_norm": 0.0},
        {"clip_norm": math.inf},
        {"multiplier": -1.0},
        {"multiplier": 1e-9},  # the grid would be all that is left of the noise
        {"multiplier": 1e9},
        {"honest": 1},
        {"honest": 4},
        {"entries": 1, "multiplier": 0.1},
    ],
)
def test_noise_without_a_proof_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidPrivacyParameter):
        replace(NOISE, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("shift", [1, 7, 20])
@pytest.mark.parametrize("rate", [0.02, 0.3, 1.0])
def test_the_accountant_of_the_continuous_gaussian_holds_for_the_discrete_sum(
    shift: int, rate: float
) -> None:
    # one entry, two honest sites, exactly: delta at an epsilon, with and without the unit
    share, r = 16.0, 8.0  # the least noise that is let through
    span = 900
    integers = np.arange(-span, span + 1)
    one = np.exp(-(integers.astype(float) ** 2) / (2 * share**2))
    one /= one.sum()
    both = np.convolve(one, one)  # from -2 span to 2 span
    std = math.sqrt(2 * share**2 - r**2)
    without, with_unit = both[:-shift], both[shift:]  # P(k), P(k + shift)
    mixed = (1 - rate) * without + rate * with_unit
    grid = np.linspace(-12 * std - shift, 12 * std + shift, 400_001)
    width = grid[1] - grid[0]
    normal, moved = stats.norm.pdf(grid, 0, std), stats.norm.pdf(grid, -shift, std)
    sampled = (1 - rate) * normal + rate * moved
    for epsilon in (0.0, 0.05, 0.3, 1.0, 2.0):
        factor = math.exp(epsilon)
        discrete = [
            np.maximum(mixed - factor * without, 0).sum(),
            np.maximum(without - factor * mixed, 0).sum(),
        ]
        continuous = [
            np.maximum(sampled - factor * normal, 0).sum() * width,
            np.maximum(normal - factor * sampled, 0).sum() * width,
        ]
        for found, allowed in zip(discrete, continuous, strict=True):
            assert found <= allowed * (1 + 1e-6) + 1e-9
