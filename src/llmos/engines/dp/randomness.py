"""Secret random streams: one key per run, one AES-256-CTR stream per purpose and step."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

_KEY_BYTES: Final = 32
_LABEL: Final = "llmos/dp/v1"


class RandomnessSource(StrEnum):
    """Where a run's key comes from; certificates say so."""

    OPERATING_SYSTEM = "os-urandom"
    INSECURE_TEST = "insecure-test"


class Purpose(StrEnum):
    """What a stream is for; streams of different purposes are independent."""

    SAMPLING = "sampling"
    NOISE = "noise"


class Stream:
    """A keystream of AES-256 in counter mode, read once from its start (NIST SP 800-38A, 6.5)."""

    def __init__(self, key: bytes) -> None:
        """Start a stream; the key is used for this stream alone, so the counter starts at zero."""
        self._keystream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def words(self, count: int) -> NDArray[np.uint64]:
        """Return the next `count` uniform 64-bit words."""
        words = np.zeros(count, dtype=np.uint64)
        octets = words.view(np.uint8)
        self._keystream.update_into(octets.data, octets.data)
        return words

    def choose(self, bound: int, count: int) -> NDArray[np.int64]:
        """Return `count` distinct numbers below `bound` (all of them at most), in random order.

        Sorting by random words is uniform up to equal words: probability below bound^2 / 2^65.
        """
        return np.argsort(self.words(bound), kind="stable")[:count]


@dataclass(frozen=True, slots=True)
class Randomness:
    """The key of one run; never stored: a resumed run takes a fresh one."""

    source: RandomnessSource
    key: bytes = field(repr=False)

    @classmethod
    def fresh(cls) -> Randomness:
        """Take a key from the operating system."""
        return cls(RandomnessSource.OPERATING_SYSTEM, os.urandom(_KEY_BYTES))

    @classmethod
    def insecure_test(cls, seed: int) -> Randomness:
        """Make a repeatable key for tests; whoever knows the seed can subtract the noise."""
        return cls(RandomnessSource.INSECURE_TEST, seed.to_bytes(_KEY_BYTES, "big"))

    def stream(self, purpose: Purpose, step: int) -> Stream:
        """Return the stream of one purpose in one step (HKDF-SHA256, RFC 5869).

        Streams depend on nothing drawn before, so that a resumed run with the same key repeats
        exactly what an uninterrupted one does.
        """
        info = f"{_LABEL}/{purpose}/{step}".encode()
        return Stream(HKDF(hashes.SHA256(), _KEY_BYTES, salt=None, info=info).derive(self.key))
