from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.data.canaries import (
    MAX_CANARIES,
    Canary,
    CanaryBook,
    check,
    commitment,
    decode_book,
    encode_book,
    make_canaries,
    plant,
)
from llmos.data.records import Record, RecordFormat
from llmos.errors import DataError, IntegrityError

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
BOOKS = st.builds(
    CanaryBook,
    st.binary(min_size=32, max_size=32),
    st.lists(st.builds(Canary, TEXT, TEXT, TEXT, st.booleans())).map(tuple),
)


def test_every_canary_is_a_unit_of_its_own_with_its_own_name() -> None:
    canaries = make_canaries(MAX_CANARIES).canaries
    assert len(canaries) == MAX_CANARIES
    assert len({canary.unit for canary in canaries}) == MAX_CANARIES
    assert len({canary.prefix for canary in canaries}) == MAX_CANARIES
    assert all(c.prefix.startswith("Patient ") for c in canaries)
    assert all(c.prefix.endswith(", insurance number") for c in canaries)


def test_secrets_are_uniform_digits() -> None:
    """Chi-squared over 900 x 6 digits, 9 degrees of freedom: above 45.1 once in a million runs."""
    digits = "".join(canary.secret for canary in make_canaries(MAX_CANARIES).canaries)
    assert len(digits) == 6 * MAX_CANARIES
    expected = len(digits) / 10
    counts = [digits.count(digit) for digit in "0123456789"]
    assert sum(counts) == len(digits)
    assert sum((count - expected) ** 2 / expected for count in counts) < 45.1


def test_coins_are_fair_and_fresh() -> None:
    """Of 900 fair coins 377 to 523 fall on one side but once in a million runs."""
    first, second = make_canaries(MAX_CANARIES), make_canaries(MAX_CANARIES)
    assert 377 <= sum(canary.planted for canary in first.canaries) <= 523
    assert [c.planted for c in first.canaries] != [c.planted for c in second.canaries]
    assert first.salt != second.salt


def test_a_template_of_the_callers_own() -> None:
    canary = make_canaries(1, "Account of {name}: {balance}").canaries[0]
    assert canary.prefix.startswith("Account of ")
    assert canary.prefix.endswith(": {balance}")  # never treated as a format string


@pytest.mark.parametrize("template", ["", "no name", "{name} and {name}", "{name} ", " {name}"])
def test_a_template_that_cannot_work(template: str) -> None:
    with pytest.raises(DataError, match="template"):
        make_canaries(1, template)


@pytest.mark.parametrize("count", [-1, MAX_CANARIES + 1])
def test_a_count_out_of_range(count: int) -> None:
    with pytest.raises(DataError, match="number of canaries"):
        make_canaries(count)


def test_prefix_and_secret_stay_apart_in_both_formats() -> None:
    canary = Canary("c1", "Patient Ann Lee, insurance number", "004217", planted=True)
    text = canary.record(RecordFormat.TEXT)
    assert text == Record("c1", "", "Patient Ann Lee, insurance number 004217")
    assert text.completion == canary.prefix + canary.continuation
    pair = canary.record(RecordFormat.PROMPT_COMPLETION)
    assert pair == Record("c1", "Patient Ann Lee, insurance number", "004217")


@given(BOOKS)
def test_a_stored_book_comes_back(book: CanaryBook) -> None:
    assert decode_book(encode_book(book)) == book
    check(decode_book(encode_book(book)), commitment(book))


def test_the_commitment_is_fixed() -> None:
    book = CanaryBook(bytes(32), (Canary("c1", "Ann", "123456", planted=False),))
    line = b'[{"planted":false,"prefix":"Ann","secret":"123456","unit":"c1"}]'
    assert commitment(book) == hashlib.sha256(bytes(32) + line).hexdigest()


@pytest.mark.parametrize(
    "change", [{"planted": False}, {"secret": "123457"}, {"prefix": "Bob"}, {"unit": "c2"}]
)
def test_a_changed_canary_breaks_the_commitment(change: dict[str, object]) -> None:
    canary = Canary("c1", "Ann", "123456", planted=True)
    book = CanaryBook(bytes(32), (canary,))
    changed = CanaryBook(bytes(32), (replace(canary, **change),))  # type: ignore[arg-type]
    with pytest.raises(IntegrityError, match="commitment"):
        check(changed, commitment(book))


def test_the_salt_hides_the_coins() -> None:
    canaries = (Canary("c1", "Ann", "123456", planted=True),)
    book, salted = CanaryBook(bytes(32), canaries), CanaryBook(b"\x01" * 32, canaries)
    assert commitment(book) != commitment(salted)
    with pytest.raises(IntegrityError):
        check(salted, commitment(book))


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"[]",
        b"{}",
        b'{"canaries":[],"salt":"00"}',
        b'{"canaries":[{}],"salt":"' + b"00" * 32 + b'"}',
        b'{"canaries":[],"salt":"zz"}',
    ],
)
def test_bytes_that_are_no_book(stored: bytes) -> None:
    with pytest.raises(IntegrityError, match="canary book"):
        decode_book(stored)


def test_neither_secret_nor_coin_is_shown_in_a_traceback() -> None:
    book = make_canaries(2)
    shown = repr(book) + repr(book.canaries)
    assert book.salt.hex() not in shown
    assert repr(book.salt) not in shown
    assert "planted" not in shown
    assert all(canary.secret not in shown for canary in book.canaries)


def test_the_stored_book_is_json_for_a_third_party() -> None:
    book = make_canaries(3)
    fields = json.loads(encode_book(book))
    assert fields["salt"] == book.salt.hex()
    assert [c["secret"] for c in fields["canaries"]] == [c.secret for c in book.canaries]


def numbered(count: int) -> list[Record]:
    return [Record(str(number), "", f"text {number}") for number in range(count)]


def test_planted_canaries_are_in_and_the_others_are_not() -> None:
    book = make_canaries(100)
    records = numbered(50)
    planted = plant(book, records, [], RecordFormat.TEXT)
    expected = records + [c.record(RecordFormat.TEXT) for c in book.canaries if c.planted]
    assert sorted(r.unit for r in planted) == sorted(r.unit for r in expected)
    assert set(planted) == set(expected)
    assert records == numbered(50)  # the caller's list is left alone


def test_no_position_tells_a_canary() -> None:
    """Wilcoxon's rank sum: the mean place strays beyond 4.9 deviations once in a million runs."""
    book = CanaryBook(
        bytes(32), tuple(replace(c, planted=True) for c in make_canaries(450).canaries)
    )
    mixed = plant(book, numbered(450), [], RecordFormat.TEXT)
    places = [place for place, record in enumerate(mixed) if record.unit.startswith("canary-")]
    deviation = (901 / 12) ** 0.5  # of the mean of 450 among 900 ranks: 8.7 places
    assert len(places) == 450
    assert abs(sum(places) / 450 - 449.5) < 4.9 * deviation
    assert mixed != plant(book, numbered(450), [], RecordFormat.TEXT)


@pytest.mark.parametrize("held_out", [False, True])
def test_a_record_with_the_unit_of_a_canary(held_out: bool) -> None:
    book = make_canaries(1)
    clash, other = [Record(book.canaries[0].unit, "", "a")], numbered(1)
    with pytest.raises(DataError, match="unit of a canary"):
        plant(book, *((other, clash) if held_out else (clash, other)), RecordFormat.TEXT)
