from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.errors import ModelError
from llmos.models.container import pack, unpack

NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True)


@given(st.dictionaries(NAMES, st.binary(max_size=50), max_size=4))
def test_what_is_packed_is_unpacked(files: dict[str, bytes]) -> None:
    assert unpack(pack(files)) == files


def test_the_order_of_the_files_does_not_matter() -> None:
    assert pack({"a": b"1", "b": b"22"}) == pack({"b": b"22", "a": b"1"})


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a\n", "x" * 101])
def test_only_plain_file_names_are_packed(name: str) -> None:
    with pytest.raises(ModelError, match="name of a file"):
        pack({name: b""})


def container(header: object, body: bytes = b"") -> bytes:
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + body


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"\xff" * 8,
        (1 << 40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"x",
        (1).to_bytes(8, "little") + b"{",
        container([]),
        container({"../../etc/passwd": 1}, b"x"),
        container({"a": -1}, b""),
        container({"a": True}, b"x"),
        container({"a": "1"}, b"x"),
        container({"a": 2}, b"x"),
        container({"a": 1}, b"xy"),
        container({"b": 1, "a": 1}, b"xy"),
        container({"a" * 99 + str(n): 0 for n in range(1000)}),
    ],
)
def test_foreign_bytes_are_refused(packed: bytes) -> None:
    with pytest.raises(ModelError):
        unpack(packed)


@given(st.binary(max_size=200))
def test_any_bytes_are_unpacked_or_refused(packed: bytes) -> None:
    try:
        files = unpack(packed)
    except ModelError:
        return
    assert unpack(pack(files)) == files
