"""Poisson sampling, shuffled epochs and microbatches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from llmos.engines.dp.plan import DPPlan, GaussianClipping
from llmos.engines.dp.randomness import Purpose, Randomness
from llmos.engines.dp.sampling import (
    Draw,
    Sampler,
    TrainingRecord,
    microbatches,
    poisson_sample,
)
from llmos.errors import EngineError

PLAN = DPPlan(units=12, expected_batch_units=3, steps=9, privacy=GaussianClipping(1, 1))
SEEDED = Randomness.insecure_test(0)
FALSE_ALARM = 1e-9


def records(units: int, per_unit: int = 1) -> list[TrainingRecord]:
    return [TrainingRecord(unit % units, (1, 2, 3), 1) for unit in range(units * per_unit)]


def test_inclusion_counts_are_binomial() -> None:
    """Each unit's count over 4,000 batches, all counts and all sizes; false alarm 1e-9 each."""
    batches, units, probability = 4000, 40, 0.1
    stream = Randomness.fresh().stream(Purpose.SAMPLING, 0)
    taken = np.zeros((batches, units))
    for batch in taken:
        batch[poisson_sample(units, probability, stream)] = 1
    per_unit = stats.binom(batches, probability)
    low, high = per_unit.ppf([FALSE_ALARM / 2 / units, 1 - FALSE_ALARM / 2 / units])
    assert low <= taken.sum(0).min()
    assert taken.sum(0).max() <= high
    low, high = stats.binom(batches * units, probability).ppf(
        [FALSE_ALARM / 2, 1 - FALSE_ALARM / 2]
    )
    assert low <= taken.sum() <= high
    sizes = taken.sum(1)
    spread = sizes.var() / (units * probability * (1 - probability))
    bounds = stats.norm.isf(FALSE_ALARM / 2) * np.sqrt(2.2 / batches)
    assert abs(spread - 1) < bounds  # fixed-size sampling would give 0


def test_probability_one_takes_everyone() -> None:
    stream = Randomness.fresh().stream(Purpose.SAMPLING, 0)
    assert poisson_sample(5, 1.0, stream) == [0, 1, 2, 3, 4]


def test_batches_repeat_by_step_and_differ_between_steps() -> None:
    sampler = Sampler(records(12), PLAN)
    batches = [sampler.batch(step, SEEDED) for step in range(20)]
    assert [sampler.batch(step, SEEDED) for step in range(20)] == batches
    assert len({tuple(draw.unit for draw in batch) for batch in batches}) > 10


def test_a_unit_brings_at_most_its_cap_of_distinct_records() -> None:
    plan = replace(PLAN, expected_batch_units=12, max_records_per_unit=3)
    sampler = Sampler(records(12, per_unit=7), plan)
    draws = sampler.batch(0, SEEDED)
    assert len(draws) == 12
    for draw in draws:
        assert len(set(draw.records)) == 3
        assert {record % 12 for record in draw.records} == {draw.unit}


def test_the_records_of_a_unit_are_drawn_uniformly() -> None:
    """Chi-square over 2,000 draws, false alarm 1e-9 over fresh keys."""
    plan = DPPlan(1, 1, 1, GaussianClipping(1, 1), max_records_per_unit=2)
    randomness = Randomness.fresh()
    sampler = Sampler(records(1, per_unit=5), plan)
    drawn = [
        record for step in range(2000) for record in sampler.batch(step, randomness)[0].records
    ]
    # Records of one batch exclude each other, which only makes the counts steadier.
    assert stats.chisquare(np.bincount(drawn, minlength=5)).pvalue > FALSE_ALARM


@pytest.mark.parametrize("units", [0, 13])
def test_data_with_no_unit_or_with_more_than_planned_are_refused(units: int) -> None:
    with pytest.raises(EngineError, match=f"12 units, the data has {units}"):
        Sampler(records(units) if units else [], PLAN)


def test_the_units_that_are_left_are_drawn_with_the_planned_probability() -> None:
    """A unit less is a neighbouring dataset: nobody else's chance changes. False alarm 1e-9."""
    plan = replace(PLAN, steps=4000)
    randomness = Randomness.fresh()
    sampler = Sampler(records(9), plan)
    taken = np.zeros(9)
    for step in range(4000):
        taken[[draw.unit for draw in sampler.batch(step, randomness)]] += 1
    low, high = stats.binom(4000, 3 / 12).ppf([FALSE_ALARM / 18, 1 - FALSE_ALARM / 18])
    assert ((low <= taken) & (taken <= high)).all()


def test_without_privacy_the_units_that_are_left_share_the_epochs() -> None:
    sampler = Sampler(records(9), replace(PLAN, privacy=None))
    drawn = [draw.unit for step in range(3) for draw in sampler.batch(step, SEEDED)]
    assert sorted(drawn) == list(range(9))


@pytest.mark.parametrize("batch_units", [1, 3, 5, 12])
def test_without_privacy_every_epoch_takes_each_unit_once(batch_units: int) -> None:
    plan = replace(PLAN, privacy=None, expected_batch_units=batch_units)
    sampler = Sampler(records(12), plan)
    sequence = [draw.unit for step in range(60) for draw in sampler.batch(step, SEEDED)]
    assert {len(sampler.batch(step, SEEDED)) for step in range(60)} == {batch_units}
    epochs = [sequence[start : start + 12] for start in range(0, len(sequence) - 11, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("labels_from", [0, 3, 4])
def test_a_record_without_labels_is_refused(labels_from: int) -> None:
    with pytest.raises(EngineError, match="nothing to predict"):
        TrainingRecord("a", (1, 2, 3), labels_from)


@given(
    counts=st.lists(st.integers(1, 4), max_size=12),
    budget=st.integers(1, 200),
    data=st.data(),
)
def test_microbatches_keep_units_whole(counts: list[int], budget: int, data: st.DataObject) -> None:
    size = sum(counts)
    lengths = data.draw(st.lists(st.integers(2, 60), min_size=size, max_size=size))
    starts = np.cumsum([0, *counts])
    draws = [
        Draw(unit, tuple(range(starts[unit], starts[unit] + count)))
        for unit, count in enumerate(counts)
    ]
    packed = microbatches(draws, lengths, budget)
    assert sorted(record for m in packed for record in m.records) == list(range(size))
    unit_of_record = np.repeat(np.arange(len(counts)), counts)
    for m in packed:
        members = {int(unit_of_record[record]) for record in m.records}
        assert len(members) == m.units == len(set(m.unit_of_row))
        assert sum(counts[unit] for unit in members) == len(m.records)
        padded = len(m.records) * max(lengths[record] for record in m.records)
        assert padded <= budget or m.units == 1
