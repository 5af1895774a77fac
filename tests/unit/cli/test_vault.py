"""`llmos vault` and `llmos init --pkcs11`, typed for real homes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests import softhsm
from tests.homes import books, opened, run_llmos
from tests.unit.cli.conftest import Type


class Everything:
    """A grant for all objects."""

    def permits(self, object_id: str) -> bool:
        return True


def records(home: Path, **settings: object) -> bytes:
    with opened(home, **settings) as system:
        card = system.datasets.card("notes")
        return system.kernel.vault.read(card.object_id, "records", Everything())


def last_entries(typed: Type, count: int) -> list[dict[str, object]]:
    size = typed("log", "verify", "--json").value["entries"]
    shown = typed("log", "show", "--after", str(size - count - 1), "--json").value
    return [entry for entry in shown if entry.get("action") == "manage-vault"]


def test_a_sweep_says_what_it_removed(typed: Type, home: Path) -> None:
    before = books(home)
    said = typed("vault", "sweep")
    assert said.status == 0
    assert said.out == "removed: 0 objects that nothing named, 0 files without a key\n"
    assert typed("vault", "sweep", "--older-than", "2", "--json").value == {
        "objects": 0,
        "files": 0,
    }
    refused = typed("vault", "sweep", "--older-than", "0.5")
    assert "last hour" in refused.err
    assert refused.status != 0
    assert books(home) == before


def test_a_rotation_is_shown_and_recorded(typed: Type, home: Path) -> None:
    before, plain = books(home), records(home)
    (first,) = typed("vault", "show", "--json").value
    assert (first["tenant"], first["version"], first["retired_at"]) == ("default", 1, None)
    done = typed("vault", "rotate", "--json").value
    units = 2 * 24  # a key for each patient of both datasets
    assert done == {"version": 2, "rewrapped": first["objects"] + units, "retired": 1}
    old, new = typed("vault", "show", "--json").value
    assert (old["objects"], new["objects"]) == (0, first["objects"])
    assert old["retired_at"] is not None
    assert new["retired_at"] is None
    begun, ended = last_entries(typed, 2)
    for entry in (begun, ended):
        assert (entry["actor"], entry["outcome"]) == ("admin", "done")
    assert "begin" in str(begun)
    assert "'retired': 1" in str(ended)
    assert "version 3: " in typed("vault", "rotate").out
    assert "default" in typed("vault", "show").out
    assert (books(home), records(home)) == (before, plain)


def test_only_an_administrator_may_touch_the_vault(
    typed: Type, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for role in ("steward", "engineer", "auditor", "developer"):
        typed("user", "add", role, "--role", role)
    key_file = (home / "root.key").read_bytes()
    for role in ("steward", "engineer", "auditor", "developer"):
        monkeypatch.setenv("LLMOS_PRINCIPAL", role)
        for command in (("rotate",), ("rekey", "--to", "key-file")):
            refused = typed("vault", *command)
            assert (refused.status, refused.out) == (5, "")
    monkeypatch.delenv("LLMOS_PRINCIPAL")
    assert len(typed("vault", "show", "--json").value) == 1
    assert (home / "root.key").read_bytes() == key_file


def test_a_home_made_before_needs_no_newer_schema(typed: Type, home: Path) -> None:
    schema = home / "policy/policy.cedarschema"
    schema.write_text(schema.read_text().replace('"manage-vault",', ""))
    assert typed("vault", "rotate").status == 0


def test_the_root_key_moves_from_file_to_passphrase_and_back(
    typed: Type, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, plain = books(home), records(home)
    files = [tmp_path / "old", tmp_path / "new"]
    for number, file in enumerate(files):
        file.write_text(f"correct horse {number}\n")
        told = typed("vault", "rekey", "--to", "passphrase", "--passphrase-file", str(file))
        assert (told.status, "horse" in told.out + told.err) == (0, False)
        assert not (home / "root.key").exists()
        monkeypatch.setenv("LLMOS_PASSPHRASE_FILE", str(file))
        assert records(home) == plain
    monkeypatch.setenv("LLMOS_PASSPHRASE_FILE", str(files[0]))
    assert typed("data", "ls").status == 4
    monkeypatch.setenv("LLMOS_PASSPHRASE_FILE", str(files[1]))
    stray = home / "root.key"
    stray.touch(mode=0o600)
    assert "rekey --to passphrase" in typed("doctor").out
    told = typed("vault", "rekey", "--to", "key-file", "--json").value
    assert told == {"home": str(home), "root key": "key-file", "key file": str(stray)}
    monkeypatch.delenv("LLMOS_PASSPHRASE_FILE")
    assert (books(home), records(home)) == (before, plain)
    stick = tmp_path / "stick.key"
    assert "stick.key" in typed("vault", "rekey", "--to", "key-file", "--key-file", str(stick)).out
    assert not stray.exists()
    assert records(home, key_file=stick) == plain


def test_a_move_that_fails_leaves_no_key_in_the_clear(
    typed: Type, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "words").write_text("correct horse\n")
    words = str(tmp_path / "words")
    assert typed("vault", "rekey", "--to", "passphrase", "--passphrase-file", words).status == 0
    monkeypatch.setenv("LLMOS_PASSPHRASE_FILE", words)

    def broken(_path: Path, _target: Path) -> Path:
        raise OSError(errno.EIO, "Input/output error", "the disk")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", broken)
        refused = typed("vault", "rekey", "--to", "key-file")
    assert refused.status == 12
    assert "the disk cannot be used" in refused.err
    assert not list(home.glob("root.*[!n]")), "neither root.key nor root.json.part"
    assert typed("vault", "show").status == 0
    # a key file that was there before is not removed, whatever happens
    assert typed("vault", "rekey", "--to", "key-file").status == 0
    (home / "root.json.part").mkdir()
    assert typed("vault", "rekey", "--to", "key-file").status == 12
    stick = str(tmp_path / "stick.key")
    assert typed("vault", "rekey", "--to", "key-file", "--key-file", stick).status == 12
    (home / "root.json.part").rmdir()
    monkeypatch.delenv("LLMOS_PASSPHRASE_FILE")
    assert typed("vault", "show").status == 0


def test_a_new_passphrase_is_asked_for_at_a_terminal_only(
    typed: Type, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMOS_PASSPHRASE", "not the new one")
    refused = typed("vault", "rekey", "--to", "passphrase")
    assert (refused.status, refused.out) == (4, "")
    assert "no terminal" in refused.err
    assert (home / "root.key").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("vault", "rekey", "--to", "pkcs11"),
        ("init", "--pkcs11", "/x.so"),
        ("init", "--token", "t"),
        ("init", "--passphrase", "--key-file", "/x"),
    ],
)
def test_ways_that_do_not_go_together_are_refused(typed: Type, arguments: tuple[str, ...]) -> None:
    assert typed(*arguments).status == 2


def test_a_token_opens_its_home(tmp_path: Path, home: Path) -> None:
    module, conf = softhsm.module(), tmp_path / "softhsm2.conf"
    softhsm.make_token(tmp_path)
    pin = tmp_path / "pin"
    pin.write_text(f"{softhsm.PIN}\n")
    (tmp_path / "wrong").write_text("000000\n")
    token = {"SOFTHSM2_CONF": str(conf), "LLMOS_PKCS11_PIN_FILE": str(pin)}
    opening = {**token, "LLMOS_PKCS11_MODULE": str(module)}
    fresh = tmp_path / "fresh"
    arguments = ("init", "--pkcs11", str(module), "--token", softhsm.LABEL)
    made = run_llmos(fresh, *arguments, **token)
    assert (made.returncode, made.stderr) == (0, "")
    assert not (fresh / "root.key").exists()
    assert run_llmos(fresh, "vault", "rotate", **opening).returncode == 0
    plain = records(home)
    moved = run_llmos(home, "vault", "rekey", "--to", "pkcs11", "--token", softhsm.LABEL, **opening)
    assert (moved.returncode, moved.stderr) == (0, "")
    assert not (home / "root.key").exists()
    refusals = {
        "no PKCS#11 module is named": token,
        "PinIncorrect": {**opening, "LLMOS_PKCS11_PIN_FILE": str(tmp_path / "wrong")},
    }
    for message, environment in refusals.items():
        refused = run_llmos(home, "data", "ls", **environment)
        assert (refused.returncode, refused.stdout) == (4, ""), message
        assert message in refused.stderr
        assert softhsm.PIN not in refused.stderr
    back = run_llmos(home, "vault", "rekey", "--to", "key-file", **opening)
    assert (back.returncode, back.stderr) == (0, "")
    assert records(home) == plain


# Rotates the home argv[1] and dies between the rotation's stages.
DYING = """
import os, signal, sys
from pathlib import Path
import llmos
from llmos.kernel.keyring import Keyring

def die(_ring):
    os.kill(os.getpid(), signal.SIGKILL)

setattr(Keyring, sys.argv[2], die)
llmos.open(Path(sys.argv[1]), device="cpu", threads=1).vault.rotate()
"""


@pytest.mark.parametrize("stage", ["begin", "rewrap", "retire"])
def test_a_rotation_that_was_killed_is_finished_by_the_next(
    typed: Type, home: Path, stage: str
) -> None:
    before, plain = books(home), records(home)
    killed = subprocess.run(
        [sys.executable, "-c", DYING, str(home), stage],
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},  # noqa: TID251
        check=False,
    )
    assert killed.returncode == -9
    assert (books(home), records(home)) == (before, plain)
    assert typed("vault", "rotate", "--json").value["version"] == 2
    assert [row["version"] for row in typed("vault", "show", "--json").value] == [1, 2]
    assert (books(home), records(home)) == (before, plain)


def test_vault_commands_need_a_home(typing: Callable[[Path], Type], tmp_path: Path) -> None:
    typed = typing(tmp_path / "none")
    for command in ("show", "rotate"):
        assert typed("vault", command).status == 12
