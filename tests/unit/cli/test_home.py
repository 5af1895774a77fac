"""`llmos init` and `llmos doctor`, and what every command says where there is no home."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.homes import books
from tests.unit.cli.conftest import Type


def test_a_passphrase_opens_a_home_and_another_one_does_not(
    typing: Callable[[Path], Type], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, right, wrong = tmp_path / "home", tmp_path / "right", tmp_path / "wrong"
    right.write_text("correct horse battery\n")
    wrong.write_text("incorrect horse\n")
    typed = typing(home)
    monkeypatch.setenv("LLMOS_PASSPHRASE_FILE", str(tmp_path / "nothing"))
    refused = typed("init", "--passphrase")
    assert (refused.status, home.exists()) == (3, False)
    monkeypatch.setenv("LLMOS_PASSPHRASE_FILE", str(right))
    assert typed("init", "--passphrase", "--json").value["root key"] == "passphrase"
    before = books(home, passphrase_file=right)
    monkeypatch.setenv("LLMOS_PASSPHRASE_FILE", str(wrong))
    for command in (("data", "ls"), ("user", "add", "x", "--role", "auditor")):
        refused = typed(*command)
        assert (refused.status, refused.out) == (4, "")
        assert "horse" not in refused.err
    monkeypatch.delenv("LLMOS_PASSPHRASE_FILE")
    nobody = typed("data", "ls")
    assert nobody.status == 4
    assert "LLMOS_PASSPHRASE_FILE" in nobody.err
    assert books(home, passphrase_file=right) == before


def test_without_a_home_commands_say_how_to_make_one(
    typing: Callable[[Path], Type], tmp_path: Path
) -> None:
    typed = typing(tmp_path / "none")
    for command in (("model", "ls"), ("budget", "ls"), ("policy", "show"), ("log", "verify")):
        said = typed(*command)
        assert (said.status, said.out) == (12, "")
        assert said.err.splitlines()[0].startswith("llmos: error: there is no home at ")
        assert said.err.splitlines()[1].startswith("llmos: hint: ")
        if command != ("policy", "show"):
            for_programs = typed(*command, "--json")
            assert (for_programs.status, for_programs.err) == (12, "")
            assert set(for_programs.value["error"]) == {"type", "message", "hint"}
    assert not (tmp_path / "none").exists()


def test_doctor_has_a_status_of_its_own(typed: Type, home: Path) -> None:
    assert typed("doctor").status == 0
    home.chmod(0o755)
    assert typed("doctor", "--json").status == 1
