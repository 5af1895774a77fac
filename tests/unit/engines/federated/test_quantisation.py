from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from llmos.engines.federated.quantisation import BLOCK, levels, quantise

VECTORS = hnp.arrays(
    np.float32, st.integers(1, 600), elements=st.floats(-1e6, 1e6, width=32, allow_nan=False)
)
BOTH = pytest.mark.parametrize("bits", [4, 8])


@BOTH
@given(vector=VECTORS)
def test_no_entry_is_off_by_more_than_half_a_step(bits: int, vector: NDArray[np.float32]) -> None:
    blocks, residual = quantise(vector, bits=bits)
    steps = np.repeat(blocks.scales, BLOCK)[: vector.size]
    tiny = np.finfo(np.float32).tiny * levels(bits)
    assert (np.abs(vector - blocks.vector) <= steps * 0.5001 + tiny).all()
    assert np.array_equal(residual, vector - blocks.vector)
    assert blocks.codes.min() >= -levels(bits)


@BOTH
@given(vector=VECTORS)
def test_it_contracts_as_error_feedback_needs(bits: int, vector: NDArray[np.float32]) -> None:
    """Karimireddy et al., Assumption A, with delta = 1 / block."""
    blocks, _ = quantise(vector, bits=bits)
    exact = vector.astype(np.float64)
    error = np.square(exact - blocks.vector).sum()
    assert error <= (1 - 1 / BLOCK) * np.square(exact).sum() * (1 + 1e-6) + 1e-60


@BOTH
def test_error_feedback_sends_everything_in_the_end(bits: int) -> None:
    generator = np.random.default_rng(0)
    sent, meant = np.zeros(1000), np.zeros(1000)
    residual = None
    for _ in range(30):
        update = generator.standard_normal(1000).astype(np.float32)
        blocks, residual = quantise(update, residual, bits=bits)
        sent += blocks.vector
        meant += update
    assert residual is not None
    np.testing.assert_allclose(sent + residual, meant, atol=1e-4)
    # without feedback thirty errors would add up: one round's is all that is missing
    assert np.abs(residual).max() < 4.5 / levels(bits)


@BOTH
def test_a_small_constant_is_lost_without_feedback_and_sent_with_it(bits: int) -> None:
    update = np.full(BLOCK, 0.2 / levels(bits), dtype=np.float32)
    update[0] = 1.0
    residual = None
    sent = np.zeros(BLOCK)
    for _ in range(50):
        blocks, residual = quantise(update, residual, bits=bits)
        assert not quantise(update, bits=bits)[0].codes[1:].any()
        sent += blocks.vector
    np.testing.assert_allclose(sent, 50 * update, atol=0.6 / levels(bits))


def test_zeros_and_numbers_too_small_to_scale_are_left_to_the_residual() -> None:
    vector = np.full(300, 1e-44, dtype=np.float32)
    vector[BLOCK:] = 0
    blocks, residual = quantise(vector, bits=8)
    assert not blocks.scales.any()
    assert not blocks.vector.any()
    assert np.array_equal(residual, vector)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_entry_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        quantise(np.array([1.0, bad], dtype=np.float32), bits=8)


def test_codes_have_4_or_8_bits() -> None:
    with pytest.raises(ValueError, match="4 or 8 bits"):
        quantise(np.ones(3, dtype=np.float32), bits=5)
