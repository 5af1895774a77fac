from __future__ import annotations

import pytest

from llmos.reports.sentences import sentence, value_at

PREDICATE = {"a": {"b": [1.5, True]}, "c/d": {"~": None}, "name": "{0}"}


@pytest.mark.parametrize(
    ("pointer", "value"),
    [("/a/b/0", 1.5), ("/a/b/1", True), ("/c~1d/~0", None), ("", PREDICATE)],
)
def test_a_pointer_leads_where_rfc_6901_says(pointer: str, value: object) -> None:
    assert value_at(PREDICATE, pointer) == value


@pytest.mark.parametrize("pointer", ["/x", "/a/b/2", "/a/b/x", "/a/b/0/c", "/name/x"])
def test_a_pointer_into_nothing_is_an_error(pointer: str) -> None:
    with pytest.raises((KeyError, ValueError, TypeError)):
        value_at(PREDICATE, pointer)


def test_what_is_said_is_read_at_the_basis() -> None:
    said = sentence(PREDICATE, "x", "{0} and {1}", ("/a/b/0", lambda v: f"<{v}>"), "/a/b/1", "/a")
    assert said == {"id": "x", "text": "<1.5> and yes", "basis": ["/a/b/0", "/a/b/1", "/a"]}


def test_a_value_is_never_a_template() -> None:
    assert sentence(PREDICATE, "x", "name {0}", "/name")["text"] == "name {0}"
