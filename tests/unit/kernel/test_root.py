"""root.json: what keeps the root key, and how that is changed without ever losing it."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.databases import STRICT

from llmos.config import Config, load
from llmos.crypto import keys
from llmos.crypto.root_keys import Argon2Cost, KeyFile, Passphrase
from llmos.errors import (
    HomeExists,
    IntegrityError,
    StorageError,
    StorageFull,
    TokenUnavailable,
    WrongPassphrase,
)
from llmos.kernel import root

CHEAP = Argon2Cost(memory_kib=32, passes=1, lanes=1)  # for tests only
ROOT_KEY = bytes(range(32))
PASSPHRASE = "correct horse"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "home").mkdir(mode=0o700)
    return load(home=tmp_path / "home")


def names(home: Path) -> set[str]:
    return {path.name for path in home.iterdir()}


def test_each_way_follows_the_other(config: Config, tmp_path: Path) -> None:
    home, elsewhere = config.home, tmp_path / "stick.key"
    root.write(home, root.key_file(config), ROOT_KEY)
    assert names(home) == {"root.json", "root.key"}
    assert root.unlock(config) == ROOT_KEY
    for passphrase in (PASSPHRASE, "another horse"):
        root.write(home, Passphrase(passphrase, CHEAP), ROOT_KEY)
        assert names(home) == {"root.json"}
        assert root.unlock(config, passphrase=passphrase) == ROOT_KEY
    with pytest.raises(WrongPassphrase):
        root.unlock(config, passphrase=PASSPHRASE)
    root.write(home, KeyFile(elsewhere), ROOT_KEY)
    assert names(home) == {"root.json"}
    assert root.unlock(load(home=home, key_file=elsewhere)) == ROOT_KEY
    root.write(home, root.key_file(config), ROOT_KEY)
    assert names(home) == {"root.json", "root.key"}
    assert elsewhere.exists(), "it may open other homes"
    for path in home.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600


def test_the_same_way_again_keeps_the_key_by_whatever_name(config: Config, tmp_path: Path) -> None:
    root.write(config.home, root.key_file(config), ROOT_KEY)
    (tmp_path / "link").symlink_to(config.home / "root.key")
    (tmp_path / "folder").symlink_to(config.home)
    for path in (config.home / "root.key", tmp_path / "link", tmp_path / "folder/root.key"):
        root.write(config.home, KeyFile(path), ROOT_KEY)
        assert root.unlock(config) == ROOT_KEY


def test_another_key_file_is_not_overwritten(config: Config, tmp_path: Path) -> None:
    root.write(config.home, Passphrase(PASSPHRASE, CHEAP), ROOT_KEY)
    KeyFile(tmp_path / "other.key").seal(bytes(32))
    with pytest.raises(HomeExists, match="another key file"):
        root.write(config.home, KeyFile(tmp_path / "other.key"), ROOT_KEY)
    assert names(config.home) == {"root.json"}
    assert root.unlock(config, passphrase=PASSPHRASE) == ROOT_KEY


class Forgetful:
    """A provider that gives back another key than it was given."""

    def seal(self, root_key: bytes) -> dict[str, Any]:
        return {"provider": "key-file"}

    def open(self, fields: Mapping[str, Any]) -> bytes:
        return bytes(32)


def test_what_does_not_give_the_key_back_does_not_get_it(config: Config) -> None:
    root.write(config.home, root.key_file(config), ROOT_KEY)
    before = (config.home / "root.json").read_bytes()
    with pytest.raises(IntegrityError, match="gives another one back"):
        root.write(config.home, Forgetful(), ROOT_KEY)
    assert names(config.home) == {"root.json", "root.key"}
    assert (config.home / "root.json").read_bytes() == before
    assert root.unlock(config) == ROOT_KEY


def test_a_place_that_cannot_be_written_is_named(config: Config, tmp_path: Path) -> None:
    root.write(config.home, root.key_file(config), ROOT_KEY)
    with pytest.raises(StorageError, match=r"nowhere/root\.key"):
        root.write(config.home, KeyFile(tmp_path / "nowhere/root.key"), ROOT_KEY)
    assert root.unlock(config) == ROOT_KEY


def test_a_pin_comes_from_a_file_or_a_person_and_never_from_a_passphrase(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMOS_PASSPHRASE", PASSPHRASE)
    unset = load(home=config.home)
    assert root.secret(unset, "passphrase", None) == PASSPHRASE
    assert root.secret(unset, "PIN", lambda what: f"asked for the {what}") == "asked for the PIN"
    with pytest.raises(WrongPassphrase, match="no PIN was given") as refused:
        root.secret(unset, "PIN", None)
    assert "LLMOS_PKCS11_PIN_FILE" in refused.value.hint
    (tmp_path / "pin").write_text("1234\n")
    assert root.secret(load(home=config.home, pkcs11_pin_file=tmp_path / "pin"), "PIN", None) == (
        "1234"
    )


def test_without_a_module_there_is_no_token(config: Config) -> None:
    fields = b'{"key":"k","provider":"pkcs11","sealed":"","token":"t","v":1}'
    keys.write_private(config.home / "root.json", fields)
    with pytest.raises(
        TokenUnavailable, match="no PKCS#11 module is named for the token 't'"
    ) as no:
        root.unlock(config)
    assert "LLMOS_PKCS11_MODULE" in no.value.hint


def test_a_module_that_is_no_library_is_refused_with_its_name(
    config: Config, tmp_path: Path
) -> None:
    pytest.importorskip("pkcs11", reason="python-pkcs11 is not installed")
    fields = b'{"key":"k","provider":"pkcs11","sealed":"","token":"t","v":1}'
    keys.write_private(config.home / "root.json", fields)
    named = load(home=config.home, pkcs11_module=tmp_path / "none.so")
    with pytest.raises(TokenUnavailable, match=r"none\.so, token 't'"):
        root.unlock(named, ask=lambda _what: "1234")


# Changes how the root key of copies of argv[1] is kept, in children that are killed at their first,
# second, ... audited operation (open, rename, remove) or flush, until one comes to its end. After
# every kill the home opens the old way or the new one, and doing it again ends as if never killed.
KILLER = """
import os, shutil, signal, sys
from pathlib import Path
from llmos.config import load
from llmos.crypto.root_keys import Argon2Cost, KeyFile, Passphrase
from llmos.kernel import root

origin, way, ROOT_KEY = Path(sys.argv[1]), sys.argv[2], bytes(range(32))
outcomes, kills = set(), 0

def change(home):
    to_file = way == "key-file"
    cheap = Passphrase("new", Argon2Cost(memory_kib=32, passes=2, lanes=1))
    root.write(home, KeyFile(home / "root.key") if to_file else cheap, ROOT_KEY)

def die_at(moment):
    moments, fsync = 0, os.fsync
    def count():
        nonlocal moments
        moments += 1
        if moments > moment:
            os.kill(os.getpid(), signal.SIGKILL)
    def hook(event, arguments):
        if event in {"open", "os.rename", "os.remove"}:
            count()
    def flush(descriptor):
        count()
        fsync(descriptor)
    os.fsync = flush
    sys.addaudithook(hook)

def opened(home):
    assert root.unlock(load(home=home), passphrase=None, ask=asked) == ROOT_KEY

def asked(_what):
    return "new" if '"passes":2' in path.read_text() and way != "key-file" else "old"

while True:
    home = origin.with_name(f"copy{kills}")
    path = home / "root.json"
    shutil.copytree(origin, home)
    child = os.fork()
    if child == 0:
        die_at(kills)
        change(home)
        os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
    outcomes.add(tuple(sorted((p.name, p.stat().st_size > 0) for p in home.iterdir())))
    opened(home)
    if not killed:
        break
    kills += 1
    change(home)
    opened(home)
    expected = {"root.json", "root.key"} if way == "key-file" else {"root.json"}
    assert {p.name for p in home.iterdir()} == expected
    shutil.rmtree(home)
print(kills, len(outcomes))
"""


@pytest.mark.parametrize(
    ("old", "new", "states"),
    [("key-file", "passphrase", 4), ("passphrase", "key-file", 5), ("passphrase", "passphrase", 3)],
)
def test_a_kill_at_any_moment_leaves_a_home_that_opens(
    config: Config, old: str, new: str, states: int
) -> None:
    provider = root.key_file(config) if old == "key-file" else Passphrase("old", CHEAP)
    root.write(config.home, provider, ROOT_KEY)
    run = subprocess.run(
        [sys.executable, *STRICT, "-c", KILLER, str(config.home), new],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    kills, seen = map(int, run.stdout.split())
    assert kills >= 8
    assert seen == states, "every set of files that there can be between two operations"


def test_a_file_that_does_not_fit_changes_nothing(config: Config) -> None:
    root.write(config.home, root.key_file(config), ROOT_KEY)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))  # bytes a file may have
    try:
        with pytest.raises(StorageFull, match="no room for"):
            root.write(config.home, Passphrase(PASSPHRASE, CHEAP), ROOT_KEY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(config.home) == {"root.json", "root.key"}
    assert root.unlock(config) == ROOT_KEY
