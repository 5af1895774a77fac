"""What keeps a root key: files only their owner reads, and passphrases."""

from __future__ import annotations

import json
import resource
import stat
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from llmos.crypto import keys
from llmos.crypto.root_keys import DEFAULT_COST, Argon2Cost, KeyFile, Passphrase
from llmos.errors import HomeExists, TamperedObject, UnsafeKeyFile, WrongPassphrase

CHEAP = Argon2Cost(memory_kib=32, passes=1, lanes=1)  # for tests only
ROOT_KEY = bytes(range(32))


def make(path: Path) -> bytes:
    key = keys.generate_key()
    assert KeyFile(path).seal(key) == {"provider": "key-file"}
    return key


def seal(passphrase: str, cost: Argon2Cost = DEFAULT_COST) -> dict[str, Any]:
    fields = Passphrase(passphrase, cost).seal(ROOT_KEY)
    assert fields["provider"] == "passphrase"
    return dict(fields["sealed"])


def open_(sealed: dict[str, Any], passphrase: str) -> bytes:
    return Passphrase(passphrase).open({"sealed": sealed})


def test_a_key_file_belongs_to_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "root.key"
    key = make(path)
    assert len(key) == keys.KEY_BYTES
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == f"llmos-root-key-v1:{key.hex()}\n"
    assert KeyFile(path).open({}) == key
    assert make(tmp_path / "other.key") != key


def test_a_key_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "root.key"
    key = make(path)
    with pytest.raises(HomeExists, match="another key file"):
        make(path)
    KeyFile(path).seal(key)  # the same key: it is there already
    assert KeyFile(path).open({}) == key


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o777])
def test_a_key_file_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "root.key"
    make(path)
    path.chmod(mode)
    with pytest.raises(UnsafeKeyFile, match=f"{mode:04o}") as caught:
        KeyFile(path).open({})
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
        KeyFile(path).open({})


@pytest.mark.parametrize("left", [0, 1, 30, 81])
def test_a_key_file_that_a_crash_cut_off_is_written_again(tmp_path: Path, left: int) -> None:
    path = tmp_path / "root.key"
    key = make(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:left])
    with pytest.raises(WrongPassphrase, match="not an LLMOS key file"):
        KeyFile(path).open({})
    if left > 20:  # some of the key is there: no other one takes its place
        with pytest.raises(HomeExists, match="another key file"):
            KeyFile(path).seal(keys.generate_key())
        assert path.read_bytes() == whole[:left]
    KeyFile(path).seal(key)
    assert path.read_bytes() == whole
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_key_file_without_its_line_end_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "root.key"
    key = make(path)
    without = path.read_bytes().rstrip()
    path.write_bytes(without)
    KeyFile(path).seal(key)
    assert path.read_bytes() == without
    assert KeyFile(path).open({}) == key


def test_a_missing_key_file_says_where_to_look(tmp_path: Path) -> None:
    with pytest.raises(WrongPassphrase, match="cannot be read") as caught:
        KeyFile(tmp_path / "root.key").open({})
    assert "LLMOS_KEY_FILE" in caught.value.hint


def test_a_passphrase_opens_what_it_sealed() -> None:
    sealed = json.loads(json.dumps(seal("pässword", CHEAP)))
    assert open_(sealed, "pässword") == ROOT_KEY
    assert open_(sealed, "pa\u0308ssword") == ROOT_KEY  # decomposed
    assert ROOT_KEY.hex() not in repr(sealed)
    for wrong in ("password", "pässword ", "PÄSSWORD"):
        with pytest.raises(WrongPassphrase, match="does not open"):
            open_(sealed, wrong)


def test_the_default_cost_is_rfc_9106s() -> None:
    sealed = seal("correct horse")
    assert (sealed["memory_kib"], sealed["passes"], sealed["lanes"]) == (65536, 3, 4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    assert open_(sealed, "correct horse") == ROOT_KEY
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before > 0.01  # seconds of CPU


def test_openssls_argon2id_opens_what_we_sealed() -> None:
    sealed = seal("correct horse", CHEAP)
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
        seal("", CHEAP)


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
    sealed = seal("secret", CHEAP) | fields
    with pytest.raises((TamperedObject, WrongPassphrase)):
        open_(sealed, "secret")


def test_costs_beyond_the_limits_are_refused_before_they_are_paid() -> None:
    sealed = seal("secret", CHEAP)
    with pytest.raises(TamperedObject, match="memory_kib"):
        open_(sealed | {"memory_kib": 2**40}, "secret")
    with pytest.raises(TamperedObject, match="memory_kib"):
        open_(sealed | {"lanes": 5}, "secret")


def test_a_passphrase_is_not_shown() -> None:
    assert "horse" not in repr(Passphrase("correct horse"))
