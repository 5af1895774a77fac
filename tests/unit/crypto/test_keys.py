"""Keys at rest: wrapping, derivation, and files that only their owner reads."""

from __future__ import annotations

import errno
import hmac
import resource
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.crypto import keys
from llmos.errors import StorageError, StorageFull, TamperedObject

ROOT_KEY = bytes(range(32))


def test_a_private_file_belongs_to_its_owner_and_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    keys.write_private(path, b"first")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        keys.write_private(path, b"second")
    assert path.read_bytes() == b"first"


def test_a_private_file_that_does_not_fit_leaves_no_trace(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))  # bytes a file may have
    try:
        with pytest.raises(OSError, match="too large"):
            keys.write_private(tmp_path / "secret", bytes(80))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_limits_that_were_reached_are_storage_full(number: int) -> None:
    assert isinstance(StorageError.of(OSError(number, "reason"), "it"), StorageFull)
    assert not isinstance(StorageError.of(OSError(errno.EIO, "reason"), "it"), StorageFull)


@given(st.binary(max_size=80), st.binary(max_size=20))
def test_wrapping_round_trip(key: bytes, aad: bytes) -> None:
    wrapped = keys.wrap(ROOT_KEY, key, aad)
    assert len(wrapped) == keys.NONCE_BYTES + len(key) + 16
    assert keys.unwrap(ROOT_KEY, wrapped, aad) == key
    assert keys.wrap(ROOT_KEY, key, aad) != wrapped


@given(st.data())
def test_every_flipped_bit_and_every_cut_of_a_wrapped_key_is_refused(data: st.DataObject) -> None:
    wrapped = keys.wrap(ROOT_KEY, bytes(32), b"name")
    bit = data.draw(st.integers(0, 8 * len(wrapped) - 1))
    changed = bytearray(wrapped)
    changed[bit // 8] ^= 1 << bit % 8
    cut = wrapped[: data.draw(st.integers(0, len(wrapped) - 1))]
    for bad in (bytes(changed), cut):
        with pytest.raises(TamperedObject):
            keys.unwrap(ROOT_KEY, bad, b"name")


@pytest.mark.parametrize(("kek", "aad"), [(bytes(32), b"name"), (ROOT_KEY, b"other")])
def test_another_key_or_name_does_not_unwrap(kek: bytes, aad: bytes) -> None:
    with pytest.raises(TamperedObject):
        keys.unwrap(kek, keys.wrap(ROOT_KEY, b"key", b"name"), aad)


def test_derived_keys_are_those_of_rfc_5869() -> None:
    extracted = hmac.digest(bytes(32), ROOT_KEY, "sha256")
    expanded = hmac.digest(extracted, b"llmos/a" + b"\x01", "sha256")
    assert keys.derive(ROOT_KEY, "llmos/a") == expanded
    assert keys.derive(ROOT_KEY, "llmos/b") != expanded
