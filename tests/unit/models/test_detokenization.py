from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import make_tiny_tokenizer

from llmos.models.detokenization import REPLACEMENT, Detokenizer, StopScanner

TOKENIZER = make_tiny_tokenizer()
TOKENS = st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=30)


def parts_of(tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(TOKENIZER)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


@given(TOKENS)
def test_the_parts_join_to_the_decoding_of_the_whole(tokens: list[int]) -> None:
    assert "".join(parts_of(tokens)) == TOKENIZER.decode(tokens, skip_special_tokens=True)


@given(st.text(max_size=20).filter(lambda text: REPLACEMENT not in text))
def test_no_part_of_a_text_shows_half_a_character(text: str) -> None:
    tokens = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert not any(REPLACEMENT in part for part in parts_of(tokens))


def test_a_character_appears_with_its_last_byte() -> None:
    tokens = TOKENIZER("医", add_special_tokens=False)["input_ids"]
    assert parts_of(tokens) == ["", "", "医", ""]


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    tokens = TOKENIZER("医", add_special_tokens=False)["input_ids"]
    assert parts_of(tokens[:2]) == ["", "", REPLACEMENT]


def scan(stops: list[str], chunks: list[str]) -> tuple[str, bool]:
    scanner = StopScanner(stops)
    shown = ""
    for chunk in chunks:
        shown += scanner.push(chunk)
        if scanner.stopped:
            return shown, True
    return shown + scanner.flush(), False


STOP = st.text("ab", min_size=1, max_size=4)


@given(st.lists(STOP, max_size=3), st.lists(st.text("abc", max_size=4), max_size=12))
def test_the_text_ends_before_the_first_stop_string(stops: list[str], chunks: list[str]) -> None:
    shown, stopped = scan(stops, chunks)
    text = "".join(chunks)
    assert text.startswith(shown)
    assert stopped == any(stop in text for stop in stops)
    assert not any(stop in shown for stop in stops)
    if not stopped:
        assert shown == text


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    scanner = StopScanner(["END"])
    assert [scanner.push(part) for part in ("one E", "N", "two")] == ["one ", "", "ENtwo"]
    assert scanner.flush() == ""


@pytest.mark.parametrize("chunks", [["END"], ["E", "N", "D"], ["x END y"], ["x E", "ND y"]])
def test_a_stop_string_may_come_in_parts(chunks: list[str]) -> None:
    shown, stopped = scan(["END"], chunks)
    assert stopped
    assert shown == "".join(chunks).split("END", maxsplit=1)[0]
