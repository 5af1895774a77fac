from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.engines.federated.packing import pack, packed_bytes, unpack


@given(bits=st.integers(1, 32), count=st.integers(0, 70), seed=st.integers(0, 2**32))
def test_what_is_packed_is_read_back_and_takes_no_room_to_spare(
    bits: int, count: int, seed: int
) -> None:
    values = np.random.default_rng(seed).integers(2**bits, size=count, dtype=np.uint32)
    data = pack(values, bits)
    assert len(data) == packed_bytes(count, bits) == (count * bits + 7) // 8
    assert np.array_equal(unpack(data, count, bits), values)


@given(bits=st.integers(1, 32), values=st.lists(st.integers(0, 2**32 - 1), max_size=30))
def test_the_bits_stand_one_after_the_other_lowest_first(bits: int, values: list[int]) -> None:
    small = [value >> (32 - bits) for value in values]
    number = sum(value << (bits * i) for i, value in enumerate(small))
    expected = number.to_bytes(packed_bytes(len(small), bits), "little")
    assert pack(np.array(small, dtype=np.uint32), bits) == expected


@pytest.mark.parametrize("bits", [1, 5, 19, 31])
def test_a_vector_of_many_chunks_is_read_back(bits: int) -> None:
    values = np.random.default_rng(0).integers(2**bits, size=3 * 65536 + 5, dtype=np.uint32)
    assert np.array_equal(unpack(pack(values, bits), values.size, bits), values)


def test_too_large_an_integer_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 5 bits"):
        pack(np.array([31, 32], dtype=np.uint32), 5)


@pytest.mark.parametrize("bits", [0, 33])
def test_integers_have_1_to_32_bits(bits: int) -> None:
    with pytest.raises(ValueError, match="1 to 32 bits"):
        pack(np.zeros(1, dtype=np.uint32), bits)
    with pytest.raises(ValueError, match="1 to 32 bits"):
        unpack(b"", 0, bits)


@pytest.mark.parametrize("size", [0, 1, 3])
def test_another_length_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="do not take"):
        unpack(bytes(size), 3, 5)


def test_bits_after_the_last_integer_are_refused() -> None:
    assert unpack(b"\xff\x7f", 3, 5).tolist() == [31, 31, 31]
    with pytest.raises(ValueError, match="after the last integer"):
        unpack(b"\xff\xff", 3, 5)


@pytest.mark.parametrize("bits", [4, 18, 31])
def test_two_million_entries_take_less_than_a_fifth_of_a_second(bits: int) -> None:
    """Processor time; ten times what it takes on an idle core."""
    values = np.random.default_rng(0).integers(2**bits, size=2_000_000, dtype=np.uint32)
    began = time.process_time()
    data = pack(values, bits)
    packed = time.process_time()
    unpack(data, values.size, bits)
    assert packed - began < 0.2
    assert time.process_time() - packed < 0.2
