"""Integers of k bits without gaps between them, least significant bit first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

MAX_BITS: Final = 32
_GROUP: Final = 8  # values that fill whole bytes whatever k is
_CHUNK: Final = 1 << 16  # integers, whole groups: they stay in the CPU's caches
_WORDS: Final = tuple(np.dtype(name) for name in ("u1", "<u2", "<u4", "<u8"))
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
    octets = np.zeros(_padded_bytes(values.size, bits), dtype=np.uint8)
    for start in range(0, values.size, _CHUNK):
        for place, words, shift in _places(octets, values.size, bits, start):
            given = values[start : start + _CHUNK][place].astype(words.dtype)
            np.bitwise_or(words, given << shift, out=words)
    return octets[: packed_bytes(values.size, bits)].tobytes()


def unpack(data: bytes | memoryview, count: int, bits: int) -> NDArray[np.uint32]:
    """Read `count` integers of `bits` bits back.

    Raises:
        ValueError: the length is another, a bit after the last integer is set, or `bits` is not 1
            to 32.
    """
    _check(bits)
    if len(data) != packed_bytes(count, bits):
        raise ValueError(f"{count} integers of {bits} bits do not take {len(data)} bytes")
    given = np.frombuffer(data, dtype=np.uint8)
    if bits in _WHOLE:
        return given.view(_WHOLE[bits]).astype(np.uint32)
    if (spare := 8 * given.size - count * bits) and int(given[-1]) >> (8 - spare):
        raise ValueError("bits after the last integer are set")
    octets = np.zeros(_padded_bytes(count, bits), dtype=np.uint8)
    octets[: given.size] = given
    values = np.empty(count, dtype=np.uint32)
    for start in range(0, count, _CHUNK):
        for place, words, shift in _places(octets, count, bits, start):
            values[start : start + _CHUNK][place] = words >> shift
    values &= np.uint32(2**bits - 1)
    return values


def _padded_bytes(count: int, bits: int) -> int:
    """The last word may begin in the last byte."""
    return packed_bytes(count, bits) + 8


def _places(
    octets: NDArray[np.uint8], count: int, bits: int, start: int
) -> Iterator[tuple[slice, NDArray[Any], np.unsignedinteger]]:
    """Yield the integers of a chunk by their place in a group, with the words that hold them.

    A group of eight takes `bits` bytes, so that integers of one place begin in bytes `bits` apart
    and at the same bit. A word is the smallest that holds one; it is never wider than `bits` bytes,
    so that words of one place do not overlap and can be written at once.
    """
    size = min(_CHUNK, count - start)
    for place in range(min(_GROUP, size)):
        first, shift = divmod((start + place) * bits, 8)
        word = next(word for word in _WORDS if 8 * word.itemsize >= shift + bits)
        words = np.ndarray(-(-(size - place) // _GROUP), word, octets, first, (bits,))
        yield slice(place, None, _GROUP), words, word.type(shift)


def _check(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"integers have 1 to {MAX_BITS} bits, not {bits}")
