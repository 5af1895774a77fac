"""Sealed records: bound to unit, dataset and place; erased ones skipped, missing keys refused."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.data.records import Record, fingerprint
from llmos.data.sealing import open_records, seal_records
from llmos.errors import IntegrityError, TamperedObject

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
RECORDS = [Record(f"p{n % 3}", "", f"note {n}") for n in range(7)]
PLACE = "ward|records"


def name_of(unit: str) -> str:
    return hashlib.sha256(unit.encode()).hexdigest()[:32]


def read(
    stored: bytes,
    unit_keys: Mapping[str, bytes],
    *,
    place: str = PLACE,
    erased: tuple[str, ...] = (),
    expected: str | None = None,
) -> list[Record]:
    expected = fingerprint(stored) if expected is None else expected
    return list(open_records(io.BytesIO(stored), expected, place, unit_keys, erased))


@given(st.lists(st.builds(Record, TEXT, TEXT, TEXT)))
def test_what_was_sealed_comes_back_in_order(records: list[Record]) -> None:
    stored, unit_keys = seal_records(records, PLACE, name_of)
    assert read(stored, unit_keys) == records
    assert set(unit_keys) == {name_of(record.unit) for record in records}
    assert stored.count(b"\n") == len(records)


def test_lines_are_canonical_and_say_nothing_in_the_clear() -> None:
    stored, _ = seal_records([Record("Zoë", "", "asthma")], PLACE, name_of)
    fields = json.loads(stored)
    assert stored == json.dumps(fields, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    assert set(fields) == {"sealed", "unit"}
    assert b"asthma" not in stored


def test_each_unit_has_a_key_of_its_own_and_each_import_new_ones() -> None:
    _, first = seal_records(RECORDS, PLACE, name_of)
    _, second = seal_records(RECORDS, PLACE, name_of)
    assert len({*first.values(), *second.values()}) == 6


def test_an_erased_unit_is_left_out_whatever_keys_there_are() -> None:
    stored, unit_keys = seal_records(RECORDS, PLACE, name_of)
    left = [record for record in RECORDS if record.unit != "p1"]
    gone = name_of("p1")
    assert read(stored, unit_keys, erased=(gone,)) == left
    del unit_keys[gone]
    assert read(stored, unit_keys, erased=(gone,)) == left
    with pytest.raises(IntegrityError, match="stored record 2 is gone, and no erasure says so"):
        read(stored, unit_keys)


def test_records_are_bound_to_unit_dataset_and_place() -> None:
    stored, unit_keys = seal_records(RECORDS, PLACE, name_of)
    lines = stored.splitlines(keepends=True)
    moved = b"".join([lines[3], *lines[1:3], lines[0], *lines[4:]])  # both are of p0
    for changed in (moved, stored.replace(name_of("p1").encode(), name_of("p2").encode())):
        with pytest.raises(TamperedObject, match="its unit and its place"):
            read(changed, unit_keys)
    with pytest.raises(TamperedObject):
        read(stored, unit_keys, place="ward|holdout")


def test_a_missing_line_is_noticed_at_the_end() -> None:
    stored, unit_keys = seal_records(RECORDS, PLACE, name_of)
    shorter = stored[: stored.rindex(b"\n", 0, -1) + 1]
    with pytest.raises(IntegrityError, match="fingerprint"):
        read(shorter, unit_keys, expected=fingerprint(stored))


@pytest.mark.parametrize(
    "line",
    [
        b"not json\n",
        b"[]\n",
        b'{"unit":"p"}\n',
        b'{"sealed":1,"unit":"p"}\n',
        b'{"sealed":"*","unit":"p"}\n',
        b'{"sealed":"","unit":"p","more":1}\n',
        b'{"completion":"a","prompt":"","unit":"p"}\n',
        b"\xff\n",
    ],
)
def test_a_line_in_another_form_is_refused(line: bytes) -> None:
    with pytest.raises(IntegrityError, match="stored record 1"):
        read(line, {"p": bytes(32)})
