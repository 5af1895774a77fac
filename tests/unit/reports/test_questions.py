from __future__ import annotations

import json
import tomllib

import pytest
from tests.unit.reports.conftest import ALL_ANSWERS, SIGNED

from llmos.errors import DataError
from llmos.reports.questions import (
    LONGEST_ANSWER,
    QUESTIONS,
    Answer,
    asked,
    form,
    read_answers,
    to_dict,
)


def test_the_form_is_toml_and_an_empty_one_answers_nothing() -> None:
    assert list(tomllib.loads(form())) == [question.id for question in QUESTIONS]
    assert read_answers(form().encode(), toml=True) == {}


def test_answers_are_read_from_toml_and_from_json() -> None:
    filled = form().replace(
        '[consent]\nanswer = ""\nanswered_by = ""',
        f'[consent]\nanswer = "Yes."\nanswered_by = "{SIGNED}"',
    )
    assert read_answers(filled.encode(), toml=True) == {"consent": Answer("Yes.", SIGNED)}
    everything = json.dumps(to_dict(ALL_ANSWERS)).encode()
    assert read_answers(everything, toml=False) == ALL_ANSWERS


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        ([], "no table"),
        ({"curatr": {"answer": "x", "answered_by": "y"}}, "no question 'curatr'"),
        ({"consent": "yes"}, "not a text with a name"),
        ({"consent": {"answer": "yes"}}, "not a text with a name"),
        ({"consent": {"answer": True, "answered_by": "y"}}, "not a text with a name"),
        ({"consent": {"answer": "x", "answered_by": "y", "on": "z"}}, "not a text with a name"),
        ({"consent": {"answer": "x", "answered_by": " "}}, "empty or too long"),
        ({"consent": {"answer": "", "answered_by": "y"}}, "empty or too long"),
        ({"consent": {"answer": "x" * (LONGEST_ANSWER + 1), "answered_by": "y"}}, "too long"),
        ({"consent": {"answer": "x", "answered_by": "y" * 201}}, "too long"),
        ({"consent": {"answer": "x\u202e", "answered_by": "y"}}, "cannot be printed"),
        ({"consent": {"answer": "\ud800", "answered_by": "y"}}, "cannot be printed"),
        ({"consent": {"answer": "x", "answered_by": "y\nz"}}, "cannot be printed"),
        ({"sector": {"answer": "Hospital", "answered_by": "y"}}, "no answer to 'sector'"),
    ],
)
def test_an_answer_that_cannot_be_used_is_refused(tables: object, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read_answers(json.dumps(tables).encode(), toml=False)


@pytest.mark.parametrize(
    ("data", "toml"), [(b"\xff", True), (b"[", True), (b"{", False), (b"[" * 100_000, False)]
)
def test_what_is_neither_toml_nor_json_is_refused(data: bytes, toml: bool) -> None:
    with pytest.raises(DataError, match="the answers are not"):
        read_answers(data, toml=toml)


def test_every_question_says_why_and_whom_and_stands_once() -> None:
    found = asked(to_dict({"unit": ALL_ANSWERS["unit"]}))
    assert len({question["id"] for question in found}) == len(found) == len(QUESTIONS)
    assert all(question["why"] and question["who"] for question in found)
    assert [q["id"] for q in found if q["answer"] is not None] == ["unit"]
