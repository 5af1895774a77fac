"""The cryptographic streams."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from llmos.engines.dp.randomness import Purpose, Randomness, RandomnessSource, Stream


def test_words_are_the_aes_ctr_keystream() -> None:
    key = bytes(range(32))
    encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    expected = np.frombuffer(encryptor.update(bytes(80)), dtype=np.uint64)
    stream = Stream(key)
    assert np.array_equal(np.concatenate([stream.words(3), stream.words(7)]), expected)


def test_nist_vector() -> None:
    # NIST SP 800-38A F.5.5 (AES-256 CTR) uses another first counter; its key at counter zero is
    # what the AES-256 ECB of sixteen zero octets gives.
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(bytes(16))  # noqa: S305
    assert Stream(key).words(2).tobytes() == block


def test_purposes_steps_and_keys_are_separate() -> None:
    runs = [Randomness.insecure_test(0), Randomness.insecure_test(1)]
    heads = {
        int(run.stream(purpose, step).words(1)[0])
        for run in runs
        for purpose in Purpose
        for step in (-1, 0, 1, 2)
    }
    assert len(heads) == 2 * 2 * 4


def test_a_step_does_not_depend_on_what_was_drawn_before() -> None:
    run = Randomness.insecure_test(3)
    run.stream(Purpose.NOISE, 4).words(100)
    again = run.stream(Purpose.NOISE, 5).words(10)
    assert np.array_equal(Randomness.insecure_test(3).stream(Purpose.NOISE, 5).words(10), again)


def test_fresh_keys_differ_and_say_where_they_come_from() -> None:
    first, second = Randomness.fresh(), Randomness.fresh()
    assert first.key != second.key
    assert len(first.key) == 32
    assert first.source is RandomnessSource.OPERATING_SYSTEM
    assert Randomness.insecure_test(0).source is RandomnessSource.INSECURE_TEST


def test_the_key_is_not_printed() -> None:
    run = Randomness.fresh()
    assert run.key.hex() not in repr(run)
    assert repr(run.key) not in repr(run)


def test_choose_takes_distinct_numbers() -> None:
    chosen = Stream(bytes(32)).choose(20, 8)
    assert len(set(chosen.tolist())) == 8
    assert set(Stream(bytes(32)).choose(5, 9).tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("count", [1, 2])
def test_choose_is_uniform(count: int) -> None:
    """False alarm: 1e-6 (chi-square of a fixed stream, so the outcome does not vary)."""
    stream = Stream(b"u" * 32)
    drawn = np.concatenate([stream.choose(6, count) for _ in range(6000)])
    assert stats.chisquare(np.bincount(drawn, minlength=6)).pvalue > 1e-6
