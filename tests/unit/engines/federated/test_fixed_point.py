from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from llmos.engines.federated.fixed_point import (
    FixedPoint,
    fresh_generator,
    from_residues,
    saturation,
    to_residues,
)


@given(
    bits=st.integers(2, 24),
    sites=st.integers(1, 100),
    limit=st.floats(1e-6, 1e6),
    seed=st.integers(0, 2**32),
)
def test_the_sum_of_all_sites_is_right_to_a_step_each(
    bits: int, sites: int, limit: float, seed: int
) -> None:
    fixed = FixedPoint(limit, bits, sites)
    generator = np.random.default_rng(seed)
    updates = generator.uniform(-limit, limit, (sites, 9)).astype(np.float32)
    updates[:, 0], updates[:, 1] = 2 * limit, -2 * limit  # saturated: the extremes of the sum
    total = np.zeros(9, dtype=np.uint32)
    for update in updates:
        total += to_residues(update, fixed, generator)
    total &= np.uint32(2**fixed.modulus_bits - 1)
    exact = np.clip(updates.astype(np.float64), -limit, limit).sum(axis=0)
    assert np.abs(from_residues(total, fixed) - exact).max() <= sites * fixed.step * 1.001


def test_modulus_has_room_for_every_site() -> None:
    assert [FixedPoint(1.0, 8, n).modulus_bits for n in (1, 2, 3, 4, 5, 16, 17)] == [
        8, 9, 10, 10, 11, 12, 13,
    ]  # fmt: skip
    assert FixedPoint(1.0, 28, 16).modulus_bits == 32


def test_rounding_is_unbiased() -> None:
    """False alarm 1e-6: the mean of 100,000 roundings, normal by the central limit theorem."""
    fixed = FixedPoint(1.0, 4, 1)
    for value in (0.37, -0.37, 0.05):
        update = np.full(100_000, value * fixed.step, dtype=np.float32)
        counts = from_residues(to_residues(update, fixed, fresh_generator()), fixed) / fixed.step
        fraction = value % 1
        bound = stats.norm.isf(5e-7) * np.sqrt(fraction * (1 - fraction) / update.size)
        assert abs(counts.mean() - value) < bound
        assert len(np.unique(counts)) == 2


def test_weights_scale_and_large_entries_are_cut_off() -> None:
    fixed = FixedPoint(1.0, 16, 2)
    update = np.array([0.5, -3.0, 3.0, 0.0], dtype=np.float32)
    residues = to_residues(update, fixed, fresh_generator(), weight=0.5)
    np.testing.assert_allclose(
        from_residues(residues, fixed), [0.25, -1.0, 1.0, 0.0], atol=fixed.step
    )
    assert saturation(update, fixed, weight=0.5) == 0.5
    assert saturation(update, fixed, weight=0.1) == 0
    assert saturation(update[:0], fixed) == 0


def test_zeros_stay_zeros() -> None:
    fixed = FixedPoint(1.0, 16, 2)
    assert not to_residues(np.zeros(100_000, dtype=np.float32), fixed, fresh_generator()).any()


@pytest.mark.parametrize("weight", [0.0, -1.0, np.nan, np.inf, 1e308])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="weight"):
        to_residues(
            np.ones(1, dtype=np.float32), FixedPoint(1.0, 8, 2), fresh_generator(), weight=weight
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_entry_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        to_residues(np.array([bad], dtype=np.float32), FixedPoint(1.0, 8, 2), fresh_generator())


@pytest.mark.parametrize(
    ("limit", "bits", "sites"),
    [(0, 8, 2), (np.inf, 8, 2), (np.nan, 8, 2), (1, 1, 2), (1, 8, 0), (1, 32, 2), (1, 28, 17)],
)
def test_what_does_not_fit_words_is_refused(limit: float, bits: int, sites: int) -> None:
    with pytest.raises(ValueError, match=r"fixed-point|do not fit"):
        FixedPoint(limit, bits, sites)


def test_generators_are_not_the_same_twice() -> None:
    assert fresh_generator().random() != fresh_generator().random()
