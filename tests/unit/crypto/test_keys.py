"""Keys at rest: files only their owner reads, passphrases, wrapping and derivation."""

from __future__ import annotations

import errno
import hmac
import json
import resource
import stat
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from hypothesis import given
from hypothesis import strategies as st

from llmos.crypto import keys
from llmos.errors import (
    HomeExists,
    StorageError,
    StorageFull,
    TamperedObject,
    UnsafeKeyFile,
    WrongPassphrase,
)

CHEAP = keys.Argon2Cost(memory_kib=32, passes=1, lanes=1)  # for tests only
ROOT_KEY = bytes(range(32))


def test_a_key_file_belongs_to_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "root.key"
    key = keys.create_key_file(path)
    assert len(key) == keys.KEY_BYTES
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == f"llmos-root-key-v1:{key.hex()}\n"
    assert keys.read_key_file(path) == key
    assert keys.create_key_file(tmp_path / "other.key") != key


def test_a_key_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "root.key"
    key = keys.create_key_file(path)
    with pytest.raises(HomeExists, match="already"):
        keys.create_key_file(path)
    assert keys.read_key_file(path) == key


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o777])
def test_a_key_file_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "root.key"
    keys.create_key_file(path)
    path.chmod(mode)
    with pytest.raises(UnsafeKeyFile, match=f"{mode:04o}") as caught:
        keys.read_key_file(path)
    assert caught.value.hint == f"chmod 600 {path}"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "llmos-root-key-v1:\n",
        "llmos-root-key-v1:" + "zz" * 32,
        "llmos-root-key-v1:" + "00" * 31,
        "llmos-root-key-v1:" + "00" * 33,
        "llmos-root-key-v2:" + "00" * 32,
        "00" * 32,
        "x" * 100_000,
    ],
)
def test_another_file_is_no_key_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "root.key"
    path.touch(mode=0o600)
    path.write_text(content)
    with pytest.raises(WrongPassphrase, match="not an LLMOS key file"):
        keys.read_key_file(path)


def test_a_missing_key_file_says_where_to_look(tmp_path: Path) -> None:
    with pytest.raises(WrongPassphrase, match="cannot be read") as caught:
        keys.read_key_file(tmp_path / "root.key")
    assert "LLMOS_KEY_FILE" in caught.value.hint


def test_a_folder_that_is_not_there_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        keys.create_key_file(tmp_path / "nowhere" / "root.key")


def test_a_key_file_that_does_not_fit_leaves_no_trace(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))  # bytes a file may have
    try:
        with pytest.raises(StorageFull, match="no room"):
            keys.create_key_file(tmp_path / "root.key")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_limits_that_were_reached_are_storage_full(number: int) -> None:
    assert isinstance(StorageError.of(OSError(number, "reason"), "it"), StorageFull)
    assert not isinstance(StorageError.of(OSError(errno.EIO, "reason"), "it"), StorageFull)


def test_a_passphrase_opens_what_it_sealed() -> None:
    sealed = json.loads(json.dumps(keys.seal_with_passphrase(ROOT_KEY, "pässword", CHEAP)))
    assert keys.open_with_passphrase(sealed, "pässword") == ROOT_KEY
    assert keys.open_with_passphrase(sealed, "pa\u0308ssword") == ROOT_KEY  # decomposed
    assert ROOT_KEY.hex() not in repr(sealed)
    for wrong in ("password", "pässword ", "PÄSSWORD"):
        with pytest.raises(WrongPassphrase, match="does not open"):
            keys.open_with_passphrase(sealed, wrong)


def test_the_default_cost_is_rfc_9106s() -> None:
    sealed = keys.seal_with_passphrase(ROOT_KEY, "correct horse")
    assert (sealed["memory_kib"], sealed["passes"], sealed["lanes"]) == (65536, 3, 4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    assert keys.open_with_passphrase(sealed, "correct horse") == ROOT_KEY
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before > 0.01  # seconds of CPU


def test_openssls_argon2id_opens_what_we_sealed() -> None:
    sealed = keys.seal_with_passphrase(ROOT_KEY, "correct horse", CHEAP)
    kek = Argon2id(
        salt=b64decode(str(sealed["salt"])),
        length=32,
        iterations=CHEAP.passes,
        lanes=CHEAP.lanes,
        memory_cost=CHEAP.memory_kib,
    ).derive(b"correct horse")
    wrapped = b64decode(str(sealed["sealed"]))
    assert AESGCM(kek).decrypt(wrapped[:12], wrapped[12:], b"llmos/root-key/v1") == ROOT_KEY


def test_an_empty_passphrase_is_refused() -> None:
    with pytest.raises(WrongPassphrase, match="empty"):
        keys.seal_with_passphrase(ROOT_KEY, "", CHEAP)


@pytest.mark.parametrize(
    "fields",
    [
        {"kdf": "argon2i"},
        {"salt": "AAAA"},
        {"salt": "!"},
        {"salt": None},
        {"sealed": 5},
        {"sealed": "not base64"},
        {"memory_kib": 2**40},
        {"memory_kib": 7},
        {"memory_kib": "32"},
        {"passes": 0},
        {"passes": None},
        {"lanes": -1},
        {"lanes": 10**6},
    ],
)
def test_a_damaged_description_is_refused(fields: dict[str, Any]) -> None:
    sealed = keys.seal_with_passphrase(ROOT_KEY, "secret", CHEAP) | fields
    with pytest.raises((TamperedObject, WrongPassphrase)):
        keys.open_with_passphrase(sealed, "secret")


def test_costs_beyond_the_limits_are_refused_before_they_are_paid() -> None:
    sealed = keys.seal_with_passphrase(ROOT_KEY, "secret", CHEAP)
    with pytest.raises(TamperedObject, match="memory_kib"):
        keys.open_with_passphrase(sealed | {"memory_kib": 2**40}, "secret")
    with pytest.raises(TamperedObject, match="memory_kib"):
        keys.open_with_passphrase(sealed | {"lanes": 5}, "secret")


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
