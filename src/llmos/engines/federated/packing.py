"""Integers of k bits without gaps between them, least significant bit first."""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

MAX_BITS: Final = 32
_GROUP: Final = 8  # values that fill whole bytes whatever k is
_CHUNK_GROUPS: Final = 1 << 13  # 64 Ki values: their rows stay in the CPU's caches
_WHOLE: Final[dict[int, np.dtype[np.unsignedinteger]]] = {
    8: np.dtype("u1"),
    16: np.dtype("<u2"),
    32: np.dtype("<u4"),
}


def packed_bytes(count: int, bits: int) -> int:
    """Return how many bytes `count` integers of `bits` bits take."""
    return (count * bits + 7) // 8


def pack(values: NDArray[np.uint32], bits: int) -> bytes:
    """Pack integers below 2^`bits`; bits after the last one are zero.

    Raises:
        ValueError: a value is too large, or `bits` is not 1 to 32.
    """
    _check(bits)
    if values.size and int(values.max()) >> bits:
        raise ValueError(f"an integer has more than {bits} bits")
    if bits in _WHOLE:
        return values.astype(_WHOLE[bits]).tobytes()
    packed = np.empty((-(-values.size // _GROUP), bits), dtype=np.uint8)
    for start, end in _chunks(len(packed)):
        part = np.zeros((end - start) * _GROUP, dtype=np.uint32)
        given = values[start * _GROUP : end * _GROUP]
        part[: given.size] = given
        packed[start:end] = _pack_rows(part.reshape(-1, _GROUP).T, bits).T
    return packed.tobytes()[: packed_bytes(values.size, bits)]


def unpack(data: bytes | memoryview, count: int, bits: int) -> NDArray[np.uint32]:
    """Read `count` integers of `bits` bits back.

    Raises:
        ValueError: the length is another, a bit after the last integer is set, or `bits` is not 1
            to 32.
    """
    _check(bits)
    if len(data) != packed_bytes(count, bits):
        raise ValueError(f"{count} integers of {bits} bits do not take {len(data)} bytes")
    octets = np.frombuffer(data, dtype=np.uint8)
    if bits in _WHOLE:
        return octets.view(_WHOLE[bits]).astype(np.uint32)
    if (spare := 8 * octets.size - count * bits) and int(octets[-1]) >> (8 - spare):
        raise ValueError("bits after the last integer are set")
    groups = -(-count // _GROUP)
    values = np.empty((groups, _GROUP), dtype=np.uint32)
    for start, end in _chunks(groups):
        part = np.zeros((end - start) * bits, dtype=np.uint8)
        given = octets[start * bits : end * bits]
        part[: given.size] = given
        values[start:end] = _unpack_rows(np.ascontiguousarray(part.reshape(-1, bits).T), bits).T
    return values.reshape(-1)[:count]


def _check(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"integers have 1 to {MAX_BITS} bits, not {bits}")


def _chunks(groups: int) -> pairwise[tuple[int, int]]:
    return pairwise([*range(0, groups, _CHUNK_GROUPS), groups])


def _pack_rows(rows: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """Spread row i, the i-th values of all groups, over the byte rows that its bits lie in."""
    packed = np.zeros((bits, rows.shape[1]), dtype=np.uint8)
    for i, row in enumerate(rows):
        first, shift = divmod(i * bits, 8)
        shifted = row.astype(np.uint64) << np.uint64(shift)
        for j in range((shift + bits + 7) // 8):
            packed[first + j] |= (shifted >> np.uint64(8 * j)).astype(np.uint8)
    return packed


def _unpack_rows(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    rows = np.empty((_GROUP, packed.shape[1]), dtype=np.uint32)
    for i in range(_GROUP):
        first, shift = divmod(i * bits, 8)
        value = np.zeros(packed.shape[1], dtype=np.uint64)
        for j in range((shift + bits + 7) // 8):
            value |= packed[first + j].astype(np.uint64) << np.uint64(8 * j)
        rows[i] = (value >> np.uint64(shift)) & np.uint64(2**bits - 1)
    return rows
