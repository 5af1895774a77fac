"""Masks that hide a vector of integers mod 2^k: AES-256 in counter mode, expanded from a seed.

The pseudorandom generator of Bonawitz et al. 2017, section 3. Words of 32 bits are added mod 2^32;
since 2^k divides 2^32, the k lowest bits of the result are the sum mod 2^k, and uniform if a mask
is.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

SEED_BYTES: Final = 32
_CHUNK: Final = 1 << 15  # entries: keystream and vector stay in the CPU's caches
_WORD: Final = np.dtype("<u4")


def add_mask(vector: NDArray[np.uint32], seed: bytes, *, sign: int) -> None:
    """Add (`sign` 1) or subtract (-1) the mask of `seed` mod 2^32, in place.

    A seed is used for one mask, so that the counter may start at zero (NIST SP 800-38A, 6.5).
    """
    keystream = Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor()
    zeros = memoryview(bytes(_CHUNK * _WORD.itemsize))
    words = np.empty(_CHUNK, dtype=_WORD)
    octets = words.view(np.uint8).data
    for start in range(0, vector.size, _CHUNK):
        part = vector[start : start + _CHUNK]
        size = part.size * _WORD.itemsize
        keystream.update_into(zeros[:size], octets[:size])
        if sign > 0:
            part += words[: part.size]
        else:
            part -= words[: part.size]


def pair_sign(site: str, peer: str) -> int:
    """Return the sign with which `site` adds the mask that it shares with `peer`.

    Bonawitz et al. 2017, section 4: the two signs are opposite, so that the masks cancel.
    """
    return 1 if site > peer else -1
