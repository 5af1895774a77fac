"""Which records a step reads: Poisson sampling of units, or shuffled epochs without privacy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from llmos.engines.dp.plan import DPPlan
from llmos.engines.dp.randomness import Purpose, Randomness, Stream
from llmos.errors import EngineError

_WORD: Final = 1 << 64


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """One encoded record of one privacy unit."""

    unit: str | int
    ids: tuple[int, ...]
    labels_from: int  # position of the first token that the model has to predict, 1 or more

    def __post_init__(self) -> None:
        """Refuse a record without anything to predict."""
        if not 1 <= self.labels_from < len(self.ids):
            raise EngineError(
                f"a record of {len(self.ids)} tokens has nothing to predict from position "
                f"{self.labels_from}",
                hint="drop empty records before training",
            )


@dataclass(frozen=True, slots=True)
class Draw:
    """The records of one drawn unit."""

    unit: int  # position among the units
    records: tuple[int, ...]  # positions among the records, at least one


class Sampler:
    """Draws the batch of any step; the same step and randomness give the same batch."""

    def __init__(self, records: Sequence[TrainingRecord], plan: DPPlan) -> None:
        """Group records by unit.

        Fewer units than planned are those of a neighbouring dataset: each is drawn with the planned
        probability still, and the divisor of the noisy sum stays the planned one.

        Raises:
            EngineError: there is no unit, or there are more than planned.
        """
        grouped: dict[str | int, list[int]] = {}
        for position, record in enumerate(records):
            grouped.setdefault(record.unit, []).append(position)
        if not 1 <= len(grouped) <= plan.units:
            raise EngineError(f"the plan is for {plan.units} units, the data has {len(grouped)}")
        self._records_of_unit = list(grouped.values())
        self._plan = plan

    def batch(self, step: int, randomness: Randomness) -> list[Draw]:
        """Draw the batch of a 0-based step; under privacy it may be empty."""
        stream = randomness.stream(Purpose.SAMPLING, step)
        if self._plan.privacy is None:
            units = self._shuffled(step, randomness)
        else:
            present = len(self._records_of_unit)
            units = poisson_sample(present, self._plan.sampling_probability, stream)
        return [Draw(unit, self._some_records(unit, stream)) for unit in units]

    def _some_records(self, unit: int, stream: Stream) -> tuple[int, ...]:
        """Choose at most `max_records_per_unit` of a unit's records, uniformly."""
        records = self._records_of_unit[unit]
        if len(records) <= self._plan.max_records_per_unit:
            return tuple(records)
        chosen = stream.choose(len(records), self._plan.max_records_per_unit)
        return tuple(records[position] for position in chosen)

    def _shuffled(self, step: int, randomness: Randomness) -> list[int]:
        """Cut the step's batch out of an endless sequence of shuffled epochs."""
        units = len(self._records_of_unit)
        size = max(1, round(self._plan.expected_batch_units))
        wanted = range(step * size, (step + 1) * size)
        batch: list[int] = []
        for epoch in range(wanted.start // units, (wanted.stop - 1) // units + 1):
            # Epochs number their streams below zero, steps from zero on: no stream is used twice.
            order = randomness.stream(Purpose.SAMPLING, -1 - epoch).choose(units, units)
            first = max(0, wanted.start - epoch * units)
            batch.extend(int(unit) for unit in order[first : wanted.stop - epoch * units])
        return batch


def poisson_sample(units: int, probability: float, stream: Stream) -> list[int]:
    """Take each of `units` independently with `probability` (to 2^-64)."""
    threshold = int(probability * _WORD)
    if threshold >= _WORD:
        return list(range(units))
    return [int(unit) for unit in np.flatnonzero(stream.words(units) < np.uint64(threshold))]


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Rows that go through the model together; all rows of a unit are in one microbatch."""

    records: tuple[int, ...]  # (R,) positions among the records
    unit_of_row: tuple[int, ...]  # (R,) 0-based within this microbatch
    units: int


def microbatches(
    draws: Sequence[Draw], lengths: Sequence[int], token_budget: int
) -> list[Microbatch]:
    """Pack drawn units of similar length into microbatches of about `token_budget` padded tokens.

    Packing happens after sampling and so changes nothing about who was drawn. A unit that exceeds
    the budget by itself gets a microbatch of its own.
    """
    longest = {draw.unit: max(lengths[record] for record in draw.records) for draw in draws}
    packed: list[Microbatch] = []
    pending: list[Draw] = []
    rows = 0
    for draw in sorted(draws, key=lambda item: (longest[item.unit], item.unit)):
        rows += len(draw.records)
        if pending and rows * longest[draw.unit] > token_budget:
            packed.append(_pack(pending))
            pending, rows = [], len(draw.records)
        pending.append(draw)
    return [*packed, _pack(pending)] if pending else packed


def _pack(draws: Sequence[Draw]) -> Microbatch:
    return Microbatch(
        records=tuple(record for draw in draws for record in draw.records),
        unit_of_row=tuple(row for row, draw in enumerate(draws) for _ in draw.records),
        units=len(draws),
    )
