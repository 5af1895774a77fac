from __future__ import annotations

import hashlib
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.data.records import Record, decode_records, encode_record, fingerprint
from llmos.errors import IntegrityError

TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # a lone surrogate is no text
RECORDS = st.lists(st.builds(Record, TEXT, TEXT, TEXT))


def encode_records(records: list[Record]) -> bytes:
    """Write the stored form of older homes."""
    return b"".join(encode_record(record) + b"\n" for record in records)


@given(RECORDS)
def test_what_was_stored_comes_back_in_order(records: list[Record]) -> None:
    stored = encode_records(records)
    assert list(decode_records(io.BytesIO(stored), fingerprint(stored))) == records


@given(RECORDS)
def test_one_line_a_record(records: list[Record]) -> None:
    assert encode_records(records).count(b"\n") == len(records)


def test_the_stored_form_and_its_fingerprint_are_fixed() -> None:
    """Written out by hand: RFC 8785 sorts the names and leaves letters beyond ASCII as they are."""
    stored = encode_records([Record("p1", "Note?", 'Grün "2"\n')])
    line = '{"completion":"Grün \\"2\\"\\n","prompt":"Note?","unit":"p1"}\n'
    assert stored == line.encode()
    assert fingerprint(stored) == hashlib.sha256(line.encode()).hexdigest()


def test_a_missing_record_is_noticed_at_the_end() -> None:
    stored = encode_records([Record("p1", "", "some text"), Record("p2", "", "more text")])
    shorter = stored[: stored.index(b"\n") + 1]
    reading = decode_records(io.BytesIO(shorter), fingerprint(stored))
    assert next(reading).unit == "p1"
    with pytest.raises(IntegrityError, match="fingerprint"):
        next(reading)


@pytest.mark.parametrize(
    "line",
    [
        b"not json\n",
        b"[]\n",
        b'{"unit":"p1"}\n',
        b'{"completion":"a","prompt":"","unit":1}\n',
        b'{"completion":"\xff","prompt":"","unit":"p1"}\n',
    ],
)
def test_a_line_in_another_form_is_refused(line: bytes) -> None:
    with pytest.raises(IntegrityError, match="stored record 1"):
        list(decode_records(io.BytesIO(line), fingerprint(line)))


def test_a_record_does_not_show_its_data_in_a_traceback() -> None:
    assert "secret" not in repr(Record("secret", "secret", "secret"))
