from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llmos.data.holdout import check_fraction, split
from llmos.data.records import Record
from llmos.errors import DataError

RECORDS = st.lists(
    st.builds(Record, st.integers(0, 30).map(str), st.just(""), st.text()), min_size=1
)


@given(RECORDS, st.floats(0, 0.9))
def test_every_record_is_on_one_side_and_every_unit_whole(
    records: list[Record], fraction: float
) -> None:
    try:
        training, holdout = split(records, fraction)
    except DataError:
        assume(False)
    assert sorted(map(key, training + holdout)) == sorted(map(key, records))
    assert not {r.unit for r in training} & {r.unit for r in holdout}
    assert training == [record for record in records if record in training]  # order is kept


def key(record: Record) -> tuple[str, str]:
    return record.unit, record.completion


def test_nothing_is_held_out_at_zero() -> None:
    records = [Record(str(number), "", "a") for number in range(100)]
    assert split(iter(records), 0.0) == (records, [])


def test_units_fall_by_fresh_independent_coins() -> None:
    """Of 2000 coins of 0.3, 600 +- 100 fall but once in a million runs (4.9 deviations of 20.5)."""
    records = [Record(str(number // 2), "", "a") for number in range(4000)]
    first, second = split(records, 0.3)[1], split(records, 0.3)[1]
    assert 500 <= len({record.unit for record in first}) <= 700
    assert first != second


def test_when_everything_was_held_out() -> None:
    """One unit at 1 - 2^-53: the one coin that trains on it falls once in 10^16 runs."""
    with pytest.raises(DataError, match="no unit is left"):
        split([Record("1", "", "a")], math.nextafter(1.0, 0.0))


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_a_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(DataError, match="held-out fraction"):
        check_fraction(fraction)
    with pytest.raises(DataError, match="held-out fraction"):
        split([Record("1", "", "a")], fraction)
