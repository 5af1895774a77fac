from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.engines.federated.conftest import LAYOUT

from llmos.engines.federated.codec import (
    HEADER_BYTES,
    Encoding,
    Header,
    decode_integers,
    decode_update,
    encode_blocks,
    encode_floats,
    encode_integers,
)
from llmos.engines.federated.quantisation import quantise
from llmos.errors import UpdateRefused

SITE = "site-a"
BITS = {Encoding.FLOAT32: (32,), Encoding.BLOCKS: (4, 8), Encoding.INTEGERS: tuple(range(1, 33))}
HEADERS = st.sampled_from(Encoding).flatmap(
    lambda encoding: st.builds(
        Header,
        encoding=st.just(encoding),
        layout=st.binary(min_size=32, max_size=32),
        entries=st.integers(1, 600),
        round=st.integers(0, 2**32 - 1),
        attempt=st.integers(0, 2**32 - 1),
        bits=st.sampled_from(BITS[encoding]),
    )
)


def written(header: Header, seed: int = 0) -> bytes:
    generator = np.random.default_rng(seed)
    if header.encoding is Encoding.INTEGERS:
        residues = generator.integers(2**header.bits, size=header.entries, dtype=np.uint32)
        return encode_integers(residues, header)
    vector = generator.standard_normal(header.entries).astype(np.float32)
    if header.encoding is Encoding.BLOCKS:
        return encode_blocks(quantise(vector, bits=header.bits)[0], header)
    return encode_floats(vector, header)


def read(data: bytes, header: Header) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    decode = decode_integers if header.encoding is Encoding.INTEGERS else decode_update
    return decode(data, header, SITE)


def rewritten(vector: np.ndarray[tuple[int, ...], np.dtype[np.generic]], header: Header) -> bytes:
    if header.encoding is Encoding.INTEGERS:
        return encode_integers(vector.astype(np.uint32), header)
    return encode_floats(vector.astype(np.float32), header)


@given(header=HEADERS, seed=st.integers(0, 2**32))
def test_what_is_written_is_read_back(header: Header, seed: int) -> None:
    data = written(header, seed)
    assert len(data) == header.total_bytes
    vector = read(data, header)
    generator = np.random.default_rng(seed)
    if header.encoding is Encoding.INTEGERS:
        residues = generator.integers(2**header.bits, size=header.entries, dtype=np.uint32)
        assert np.array_equal(vector, residues)
        return
    floats = generator.standard_normal(header.entries).astype(np.float32)
    if header.encoding is Encoding.BLOCKS:
        floats = quantise(floats, bits=header.bits)[0].vector
    assert np.array_equal(vector, floats)


@settings(max_examples=300)
@given(header=HEADERS, data=st.data())
def test_changed_bytes_are_refused_or_are_another_update(
    header: Header, data: st.DataObject
) -> None:
    octets = bytearray(written(header))
    places = st.integers(0, len(octets) - 1)
    flips = data.draw(st.dictionaries(places, st.integers(1, 255), min_size=1, max_size=4))
    for place, flip in flips.items():
        octets[place] ^= flip
    if min(flips) < HEADER_BYTES:
        with pytest.raises(UpdateRefused, match=SITE):
            read(bytes(octets), header)
        return
    try:
        vector = read(bytes(octets), header)
    except UpdateRefused:
        return
    assert np.isfinite(vector).all()
    if header.encoding is not Encoding.BLOCKS:  # there two scales may give the same numbers
        assert rewritten(vector, header) == bytes(octets)


@given(header=HEADERS, junk=st.binary(max_size=200), cut=st.integers(1, 100))
def test_cut_lengthened_and_foreign_bytes_are_refused(
    header: Header, junk: bytes, cut: int
) -> None:
    data = written(header)
    for wrong in (junk, data[:-cut], data + junk + b"\0", data[:HEADER_BYTES], b""):
        with pytest.raises(UpdateRefused):
            read(wrong, header)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"round": 8}, "round"),
        ({"attempt": 4}, "attempt"),
        ({"layout": bytes(32)}, "layout"),
        ({"entries": 41}, "number of entries"),
        ({"bits": 4}, "number of bits"),
        ({"encoding": Encoding.INTEGERS}, "encoding"),
    ],
    ids=str,
)
def test_another_header_than_the_expected_is_named(changed: dict[str, object], named: str) -> None:
    header = Header(Encoding.BLOCKS, LAYOUT, 40, 7, 3, 8)
    data = written(replace(header, **changed))  # type: ignore[arg-type]
    with pytest.raises(UpdateRefused, match=f"the {named} of its update") as refused:
        read(data, header)
    assert refused.value.site == SITE


@pytest.mark.parametrize(("place", "named"), [(0, "magic"), (4, "version"), (7, "header")])
def test_another_magic_version_or_filler_is_named(place: int, named: str) -> None:
    header = Header(Encoding.FLOAT32, LAYOUT, 3, 0, 0)
    data = bytearray(written(header))
    data[place] ^= 1
    with pytest.raises(UpdateRefused, match=named):
        read(bytes(data), header)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_floats_that_are_not_finite_are_neither_written_nor_read(bad: float) -> None:
    header = Header(Encoding.FLOAT32, LAYOUT, 2, 0, 0)
    vector = np.array([0, bad], dtype=np.float32)
    with pytest.raises(ValueError, match="not finite"):
        encode_floats(vector, header)
    with pytest.raises(UpdateRefused, match="not finite"):
        read(header.pack() + vector.tobytes(), header)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0, 3e38])
def test_scales_that_are_none_are_refused(bad: float) -> None:
    header = Header(Encoding.BLOCKS, LAYOUT, 3, 0, 0, 8)
    data = header.pack() + np.array([bad], dtype="<f4").tobytes() + bytes([255, 128, 1])
    with pytest.raises(UpdateRefused, match="scale"):
        read(data, header)


def test_the_code_that_no_writer_uses_is_refused() -> None:
    header = Header(Encoding.BLOCKS, LAYOUT, 2, 0, 0, 8)
    scale = np.array([1.0], dtype="<f4").tobytes()
    assert read(header.pack() + scale + bytes([1, 255]), header).tolist() == [-127, 127]
    with pytest.raises(UpdateRefused, match="code"):
        read(header.pack() + scale + bytes([0, 255]), header)


def test_what_does_not_fit_its_header_is_not_written() -> None:
    floats = Header(Encoding.FLOAT32, LAYOUT, 3, 0, 0)
    with pytest.raises(ValueError, match="does not fit"):
        encode_floats(np.zeros(4, dtype=np.float32), floats)
    with pytest.raises(ValueError, match="does not fit"):
        encode_integers(np.zeros(3, dtype=np.uint32), floats)
    four = Header(Encoding.BLOCKS, LAYOUT, 3, 0, 0, 4)
    with pytest.raises(ValueError, match="do not fit"):
        encode_blocks(quantise(np.ones(3, dtype=np.float32), bits=8)[0], four)


@pytest.mark.parametrize(
    "changed",
    [
        {"layout": bytes(31)}, {"entries": 0}, {"round": -1}, {"attempt": 2**32}, {"bits": 7},
        {"encoding": Encoding.FLOAT32},
    ],
    ids=str,
)  # fmt: skip
def test_headers_that_no_update_has_are_refused(changed: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="no update is like this"):
        replace(Header(Encoding.BLOCKS, LAYOUT, 3, 0, 0, 8), **changed)  # type: ignore[arg-type]
