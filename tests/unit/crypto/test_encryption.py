"""Encryption: published vectors, round trips, and every kind of damage is refused."""

from __future__ import annotations

import hashlib
import io
import json
import resource
import secrets
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.crypto.encryption import (
    BUFFER_BYTES,
    CHUNK_BYTES,
    HEADER_BYTES,
    SEALED_CHUNK_BYTES,
    DecryptingReader,
    decrypt,
    encrypt,
)
from llmos.errors import TamperedObject

VECTORS = json.loads(
    (Path(__file__).parents[2] / "vectors" / "cobblestone256.json").read_text(encoding="utf-8")
)["tests"]
KEY = bytes(range(32))
CONTEXT = b"0123|checkpoint"
EDGE_SIZES = [
    0,
    1,
    CHUNK_BYTES - 1,
    CHUNK_BYTES,
    CHUNK_BYTES + 1,
    BUFFER_BYTES - 1,
    BUFFER_BYTES,
    BUFFER_BYTES + CHUNK_BYTES + 1,
    3 * BUFFER_BYTES,
]


class Trickle(io.RawIOBase):
    """A stream that moves at most `step` bytes a call, as pipes and raw files may."""

    def __init__(self, data: bytes, step: int) -> None:
        super().__init__()
        self.buffer, self.step = io.BytesIO(data), step

    def read(self, size: int = -1) -> bytes:
        return self.buffer.read(self.step if size < 0 else min(size, self.step))

    def write(self, data: Any) -> int:
        return self.buffer.write(bytes(data)[: self.step])

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.buffer.seek(offset, whence)


def sealed(plain: bytes, *, key: bytes = KEY, context: bytes = CONTEXT) -> bytes:
    sink = io.BytesIO()
    assert encrypt(key, io.BytesIO(plain), sink, context=context) == len(plain)
    return sink.getvalue()


def opened(data: bytes, *, key: bytes = KEY, context: bytes = CONTEXT) -> bytes:
    sink = io.BytesIO()
    assert decrypt(key, io.BytesIO(data), sink, context=context) == len(sink.getvalue())
    return sink.getvalue()


def opened_at_random(data: bytes, *, key: bytes = KEY, context: bytes = CONTEXT) -> bytes:
    return DecryptingReader(key, io.BytesIO(data), context).readall()


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["comment"])
@pytest.mark.parametrize("read", [opened, opened_at_random])
def test_wycheproof_vectors(vector: dict[str, Any], read: Any) -> None:
    key, context = bytes.fromhex(vector["key"]), bytes.fromhex(vector["ctx"])
    data = zlib.decompress(bytes.fromhex(vector["ct"]))
    if vector["result"] == "valid":
        plain = read(data, key=key, context=context)
        assert len(plain) == vector["msgLength"]
        assert hashlib.sha512(plain).hexdigest() == vector["msgSha512"]
    else:
        with pytest.raises(TamperedObject):
            read(data, key=key, context=context)


@pytest.mark.parametrize("size", EDGE_SIZES)
def test_round_trip_at_every_edge(size: int) -> None:
    plain = secrets.token_bytes(size)
    data = sealed(plain)
    assert len(data) == HEADER_BYTES + size + 16 * (size // CHUNK_BYTES + 1)
    assert opened(data) == opened_at_random(data) == plain


@given(st.binary(max_size=300), st.binary(max_size=40))
def test_round_trip(plain: bytes, context: bytes) -> None:
    assert opened(sealed(plain, context=context), context=context) == plain


@given(st.data(), st.sampled_from([0, 5, CHUNK_BYTES, CHUNK_BYTES + 9]))
def test_every_flipped_bit_is_refused(data: st.DataObject, size: int) -> None:
    changed = bytearray(sealed(bytes(size)))
    bit = data.draw(st.integers(0, 8 * len(changed) - 1))
    changed[bit // 8] ^= 1 << bit % 8
    for read in (opened, opened_at_random):
        with pytest.raises(TamperedObject):
            read(bytes(changed))


@given(st.data(), st.sampled_from([0, 5, CHUNK_BYTES, 2 * CHUNK_BYTES + 9]))
def test_every_cut_is_refused(data: st.DataObject, size: int) -> None:
    whole = sealed(bytes(size))
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    for read in (opened, opened_at_random):
        with pytest.raises(TamperedObject):
            read(cut)


@pytest.mark.parametrize("size", [0, CHUNK_BYTES - 1, CHUNK_BYTES])
@pytest.mark.parametrize("extra", [1, 16, SEALED_CHUNK_BYTES])
def test_appended_bytes_are_refused(size: int, extra: int) -> None:
    for read in (opened, opened_at_random):
        with pytest.raises(TamperedObject):
            read(sealed(bytes(size)) + bytes(extra))


@pytest.mark.parametrize(
    ("key", "context"), [(bytes(32), CONTEXT), (KEY, b"0123|records"), (KEY, b"")]
)
def test_another_key_or_context_is_refused(key: bytes, context: bytes) -> None:
    data = sealed(b"weights")
    for read in (opened, opened_at_random):
        with pytest.raises(TamperedObject, match="does not belong to this key and name") as caught:
            read(data, key=key, context=context)
        assert caught.value.hint


def test_a_changed_chunk_never_reaches_the_sink() -> None:
    plain = secrets.token_bytes(4 * BUFFER_BYTES)
    data = bytearray(sealed(plain))
    data[HEADER_BYTES + 20 * SEALED_CHUNK_BYTES] ^= 1
    sink = io.BytesIO()
    with pytest.raises(TamperedObject):
        decrypt(KEY, io.BytesIO(bytes(data)), sink, context=CONTEXT)
    written = sink.getvalue()
    assert len(written) <= 20 * CHUNK_BYTES
    assert plain.startswith(written)


def test_the_same_plaintext_never_looks_the_same() -> None:
    assert sealed(b"same")[:24] != sealed(b"same")[:24]


def test_streams_that_move_few_bytes_at_a_time() -> None:
    plain = secrets.token_bytes(40_000)
    sink = Trickle(b"", 1000)
    encrypt(KEY, cast("BinaryIO", Trickle(plain, 700)), cast("BinaryIO", sink), context=CONTEXT)
    data = sink.buffer.getvalue()
    target = Trickle(b"", 999)
    decrypt(KEY, cast("BinaryIO", Trickle(data, 701)), cast("BinaryIO", target), context=CONTEXT)
    assert target.buffer.getvalue() == plain
    slow = DecryptingReader(KEY, cast("BinaryIO", Trickle(data, 333)), CONTEXT)
    assert slow.readall() == plain


def test_reading_at_random_gives_what_a_plain_file_gives() -> None:
    plain = secrets.token_bytes(2 * BUFFER_BYTES + 77)
    reader, file = DecryptingReader(KEY, io.BytesIO(sealed(plain)), CONTEXT), io.BytesIO(plain)
    assert reader.size == len(plain)
    assert reader.readable()
    assert reader.seekable()
    for _ in range(200):
        offset, size = secrets.randbelow(len(plain) + 100), secrets.randbelow(3 * CHUNK_BYTES)
        assert reader.seek(offset) == file.seek(offset)
        assert reader.read(size) == file.read(size)
        assert reader.tell() == file.tell()


def test_seeking_like_a_file() -> None:
    reader = DecryptingReader(KEY, io.BytesIO(sealed(b"0123456789")), CONTEXT)
    assert (reader.seek(-3, io.SEEK_END), reader.read(2)) == (7, b"78")
    assert (reader.seek(-1, io.SEEK_CUR), reader.read(5)) == (8, b"89")
    assert (reader.seek(50), reader.read(5), reader.readall()) == (50, b"", b"")
    with pytest.raises(ValueError, match="cannot seek to -1"):
        reader.seek(-1)
    with pytest.raises(ValueError, match="whence"):
        reader.seek(0, 3)


def test_a_buffered_reader_gives_lines() -> None:
    lines = [b"%d\n" % n for n in range(20_000)]
    reader = DecryptingReader(KEY, io.BytesIO(sealed(b"".join(lines))), CONTEXT)
    assert list(io.BufferedReader(reader)) == lines


def test_random_access_sees_damage_only_where_it_is() -> None:
    data = bytearray(sealed(bytes(5 * CHUNK_BYTES)))
    data[HEADER_BYTES + 2 * SEALED_CHUNK_BYTES + 5] ^= 0x80
    reader = DecryptingReader(KEY, io.BytesIO(bytes(data)), CONTEXT)
    assert reader.read(10) == bytes(10)
    reader.seek(2 * CHUNK_BYTES)
    with pytest.raises(TamperedObject):
        reader.read(1)


def test_closing_the_reader_closes_its_source() -> None:
    source = io.BytesIO(sealed(b"x"))
    with DecryptingReader(KEY, source, CONTEXT) as reader:
        assert reader.read() == b"x"
    assert source.closed


@pytest.mark.parametrize("key", [b"", bytes(31), bytes(33)])
def test_a_key_of_another_length_is_a_mistake_of_the_caller(key: bytes) -> None:
    with pytest.raises(ValueError, match="32"):
        encrypt(key, io.BytesIO(), io.BytesIO(), context=b"")
    with pytest.raises(ValueError, match="32"):
        decrypt(key, io.BytesIO(), io.BytesIO(), context=b"")
    with pytest.raises(ValueError, match="32"):
        DecryptingReader(key, io.BytesIO(sealed(b"")), b"")


STREAM = """
import resource, sys
from llmos.crypto.encryption import decrypt, encrypt
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open(sys.argv[1], "rb") as source, open(sys.argv[2], "wb") as sink:
    encrypt(bytes(32), source, sink, context=b"")
with open(sys.argv[2], "rb") as source, open(sys.argv[1], "wb") as sink:
    assert decrypt(bytes(32), source, sink, context=b"") == 256 << 20
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_large_object_needs_little_memory(tmp_path: Path) -> None:
    plain, data = tmp_path / "plain", tmp_path / "sealed"
    with plain.open("wb") as file:
        file.truncate(256 << 20)  # sparse
    done = subprocess.run(
        [sys.executable, "-c", STREAM, str(plain), str(data)],
        check=True,
        capture_output=True,
        text=True,
    )
    page_kib = resource.getpagesize() // 1024
    assert int(done.stdout) < 16 * 1024 * max(1, page_kib // 4)  # KiB; 16 MiB for 256 MiB of data
