from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from llmos.engines.federated.masking import add_mask, pair_sign

SEED = bytes(range(32))


@pytest.mark.parametrize("size", [1, 7, 1 << 15, (1 << 16) + 3])
def test_the_mask_is_the_aes_ctr_keystream(size: int) -> None:
    keystream = (
        Cipher(algorithms.AES(SEED), modes.CTR(bytes(16))).encryptor().update(bytes(4 * size))
    )
    expected = np.frombuffer(keystream, dtype="<u4")
    vector = np.zeros(size, dtype=np.uint32)
    add_mask(vector, SEED, sign=1)
    assert np.array_equal(vector, expected)
    add_mask(vector, SEED, sign=-1)
    assert not vector.any()


def test_two_sites_masks_cancel() -> None:
    total = np.arange(100, dtype=np.uint32)
    for site, peer in (("a", "b"), ("b", "a")):
        add_mask(total, SEED, sign=pair_sign(site, peer))
    assert np.array_equal(total, np.arange(100))
    assert pair_sign("a", "b") == -pair_sign("b", "a")


@pytest.mark.parametrize("bits", [1, 7, 18])
def test_masks_mod_2_to_the_k_are_uniform(bits: int) -> None:
    """Chi-square over 128 cells at most; false alarm 1e-9 had the seed been random."""
    vector = np.zeros(1 << 17, dtype=np.uint32)
    add_mask(vector, SEED, sign=1)
    low = (vector & np.uint32(2**bits - 1)) >> np.uint32(max(0, bits - 7))
    assert stats.chisquare(np.bincount(low, minlength=2 ** min(bits, 7))).pvalue > 1e-9
