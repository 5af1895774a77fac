"""An update as bytes: one packed array behind a header that must be what the reader expects.

`magic 4 | version 1 | encoding 1 | bits 1 | 0 | block 4 | entries 8 | round 4 | attempt 4 |
layout 32`, little-endian, then the entries: float32; or one float32 scale a block and the packed
codes; or packed integers mod 2^bits. A reader builds the header it expects, compares, and takes
every length from its own; nothing in the bytes decides how much is read.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from llmos.engines.federated.packing import pack, packed_bytes, unpack
from llmos.engines.federated.quantisation import BLOCK, Blocks, blocks_of, levels
from llmos.errors import UpdateRefused

_MAGIC: Final = b"LMUP"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("<4sBBBxIQII32s")
_FIELDS: Final = (
    "magic number", "version", "encoding", "number of bits", "block size", "number of entries",
    "round", "attempt", "layout",
)  # fmt: skip
HEADER_BYTES: Final = _HEADER.size
LAYOUT_BYTES: Final = 32
_FLOAT: Final = np.dtype("<f4")


class Encoding(IntEnum):
    """How the entries stand in the bytes."""

    FLOAT32 = 1
    BLOCKS = 2
    INTEGERS = 3


@dataclass(frozen=True, slots=True)
class Header:
    """What an update is, known to both ends before it is sent."""

    encoding: Encoding
    layout: bytes  # SHA-256 of what the vector means: names and shapes in their order
    entries: int
    round: int
    attempt: int
    bits: int = 32  # of an entry

    def __post_init__(self) -> None:
        """Refuse headers that no update can have."""
        bits: dict[Encoding, tuple[int, ...] | range] = {
            Encoding.FLOAT32: (32,),
            Encoding.BLOCKS: (4, 8),
            Encoding.INTEGERS: range(1, 33),
        }
        counted = all(0 <= number < 2**32 for number in (self.round, self.attempt))
        sized = len(self.layout) == LAYOUT_BYTES and 1 <= self.entries < 2**32
        if not (counted and sized and self.bits in bits[self.encoding]):
            raise ValueError(f"no update is like this: {self}")

    @property
    def total_bytes(self) -> int:
        """Return the length of the whole update."""
        scales = blocks_of(self.entries) if self.encoding is Encoding.BLOCKS else 0
        return HEADER_BYTES + _FLOAT.itemsize * scales + packed_bytes(self.entries, self.bits)

    def pack(self) -> bytes:
        """Return the header's bytes."""
        block = BLOCK if self.encoding is Encoding.BLOCKS else 0
        return _HEADER.pack(
            _MAGIC,
            _VERSION,
            self.encoding,
            self.bits,
            block,
            self.entries,
            self.round,
            self.attempt,
            self.layout,
        )


def encode_floats(vector: NDArray[np.float32], header: Header) -> bytes:
    """Write a vector (P,) as float32.

    Raises:
        ValueError: the vector is not what the header says, or not finite.
    """
    _check(vector.shape, header, Encoding.FLOAT32)
    if not np.isfinite(vector).all():
        raise ValueError("an update has an entry that is not finite")
    return header.pack() + vector.astype(_FLOAT).tobytes()


def encode_blocks(blocks: Blocks, header: Header) -> bytes:
    """Write a quantised vector.

    Raises:
        ValueError: it is not what the header says.
    """
    _check(blocks.codes.shape, header, Encoding.BLOCKS)
    if blocks.bits != header.bits:
        raise ValueError(f"blocks of {blocks.bits} bits do not fit a header of {header.bits}")
    offset = 2 ** (blocks.bits - 1)
    codes = pack((blocks.codes.astype(np.int32) + offset).astype(np.uint32), blocks.bits)
    return header.pack() + blocks.scales.astype(_FLOAT).tobytes() + codes


def encode_integers(residues: NDArray[np.uint32], header: Header) -> bytes:
    """Write integers below 2^bits.

    Raises:
        ValueError: they are not what the header says.
    """
    _check(residues.shape, header, Encoding.INTEGERS)
    return header.pack() + pack(residues, header.bits)


def decode_update(data: bytes, expected: Header, site: str) -> NDArray[np.float32]:
    """Read a vector (P,) of floats, quantised or not.

    Raises:
        UpdateRefused: it is not what was expected of this site, or an entry is not finite.
    """
    body = _body(data, expected, site)
    if expected.encoding is Encoding.FLOAT32:
        vector = np.frombuffer(body, dtype=_FLOAT).astype(np.float32)
    else:
        vector = _read_blocks(body, expected, site).vector
    if not np.isfinite(vector).all():
        raise UpdateRefused(site, "an entry of its update is not finite")
    return vector


def decode_integers(data: bytes, expected: Header, site: str) -> NDArray[np.uint32]:
    """Read integers below 2^bits.

    Raises:
        UpdateRefused: they are not what was expected of this site.
    """
    body = _body(data, expected, site)
    try:
        return unpack(body, expected.entries, expected.bits)
    except ValueError as error:
        raise UpdateRefused(site, str(error)) from error


def _check(shape: tuple[int, ...], header: Header, encoding: Encoding) -> None:
    if header.encoding is not encoding or shape != (header.entries,):
        raise ValueError(f"a vector of shape {shape} does not fit {header}")


def _body(data: bytes, expected: Header, site: str) -> memoryview:
    if len(data) < HEADER_BYTES:
        raise UpdateRefused(site, "its update is cut off")
    if data[:HEADER_BYTES] != (header := expected.pack()):
        pairs = zip(_FIELDS, _HEADER.unpack_from(data), _HEADER.unpack(header), strict=True)
        wrong = next((name for name, got, wanted in pairs if got != wanted), "header")
        raise UpdateRefused(site, f"the {wrong} of its update is not what was expected")
    if len(data) != expected.total_bytes:
        raise UpdateRefused(
            site, f"its update has {len(data)} bytes, not the expected {expected.total_bytes}"
        )
    return memoryview(data)[HEADER_BYTES:]


def _read_blocks(body: memoryview, expected: Header, site: str) -> Blocks:
    end = _FLOAT.itemsize * blocks_of(expected.entries)
    scales = np.frombuffer(body[:end], dtype=_FLOAT).astype(np.float32)
    most = levels(expected.bits)
    # a float32 times a code must stay one: the largest code bounds the scale
    if not ((scales >= 0) & (scales <= np.finfo(np.float32).max / most)).all():
        raise UpdateRefused(site, "a scale of its update is negative or not finite")
    try:
        unsigned = unpack(body[end:], expected.entries, expected.bits)
    except ValueError as error:
        raise UpdateRefused(site, str(error)) from error
    codes = unsigned.astype(np.int32) - (most + 1)
    if (codes < -most).any():
        raise UpdateRefused(site, "a code of its update is out of range")
    return Blocks(scales, codes.astype(np.int8), expected.bits)
