from __future__ import annotations

import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import click
import pytest
from tests.unit.cli.conftest import Type

from llmos.accounts import totp
from llmos.kernel.identity import Role

PASSWORD = "correct horse battery"


@pytest.fixture
def password_file(tmp_path: Path) -> Path:
    file = tmp_path / "password"
    file.write_text(f"{PASSWORD}\n")
    return file


@pytest.fixture
def ada(typed: Type, password_file: Path) -> str:
    assert typed("user", "add", "ada", "--role", "auditor").status == 0
    said = typed("user", "password", "ada", "--password-file", str(password_file))
    assert (said.status, PASSWORD in said.out + said.err) == (0, False)
    return "ada"


def answer(monkeypatch: pytest.MonkeyPatch, *answers: str) -> list[str]:
    """Answer the next prompts; return what was asked."""
    asked: list[str] = []
    waiting = list(answers)

    def prompt(what: str, **_: object) -> str:
        asked.append(what)
        return waiting.pop(0)

    monkeypatch.setattr(click, "prompt", prompt)
    return asked


def test_the_roles_are_those_of_the_kernel(typed: Type) -> None:
    for number, role in enumerate(Role):
        made = typed("user", "add", f"u{number}", "--role", str(role), "--json").value
        facts = {"name": f"u{number}", "kind": "person", "roles": [str(role)], "tenant": None}
        assert made == facts
    assert typed("user", "add", "x", "--role", "king").status == 2


def test_people_and_services_are_listed_changed_and_disabled(typed: Type, ada: str) -> None:
    assert "robot: site" in typed("user", "add", "robot", "--role", "site", "--service").out
    rows = {row["name"]: row for row in typed("user", "ls", "--json").value}
    assert (rows["robot"]["kind"], rows["ada"]["login"]) == ("service", "password")
    assert "service" in typed("user", "ls").out
    changed = typed("user", "roles", "ada", "--role", "engineer", "--json").value
    assert changed == {"name": "ada", "roles": ["engineer"]}
    assert "steward" in typed("user", "roles", "ada", "--role", "steward").out
    assert "disabled" in typed("user", "disable", "ada").out
    assert typed("user", "disable", "robot", "--json").value["state"] == "disabled"
    assert {row["name"] for row in typed("user", "ls", "--json").value} == {"admin"}
    assert typed("user", "disable", "admin").status == 2


def test_a_password_is_asked_for_and_a_weak_one_refused(
    typed: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed("user", "add", "bob", "--role", "auditor")
    asked = answer(monkeypatch, "short", PASSWORD, PASSWORD)
    weak = typed("user", "password", "bob")
    assert (weak.status, "short" in weak.err) == (2, False)
    assert typed("user", "password", "bob", "--json").value["login"] == "password"
    assert asked == ["New password", "New password"]
    assert typed("login", "bob", "--json").value["token"].startswith("llmos_")


def test_ones_own_password_takes_the_present_one(
    typed: Type, password_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert typed("user", "password", "admin", "--password-file", str(password_file)).status == 0
    new = tmp_path / "new"
    new.write_text("another horse battery")
    answer(monkeypatch, "wrong")
    assert typed("user", "password", "admin", "--password-file", str(new)).status == 4
    both = ("--password-file", str(new), "--present-file", str(password_file))
    assert typed("user", "password", "admin", *both).status == 0


def test_a_login_writes_a_key_that_acts(
    typed: Type, ada: str, password_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "key"
    said = typed("login", ada, "--password-file", str(password_file), "--to", str(key))
    assert said.out == f"export LLMOS_API_KEY_FILE={key}\n"
    assert key.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("LLMOS_API_KEY_FILE", str(key))
    assert typed("log", "show", "--json").status == 0
    assert typed("vault", "rotate").status == 5  # as ada, who is an auditor
    key.chmod(0o644)
    refused = typed("log", "show")
    assert (refused.status, "chmod 600" in refused.err) == (4, True)


def test_a_login_that_fails_prints_no_key_and_leaves_files_alone(
    typed: Type, ada: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "thesis"
    other.write_text("mine")
    answer(monkeypatch, "wrong")
    assert typed("login", ada, "--to", str(other)).status == 12
    refused = typed("login", ada, "--to", str(tmp_path / "key"))
    assert (refused.status, refused.out) == (4, "")
    assert (other.read_text(), (tmp_path / "key").exists()) == ("mine", False)


def test_codes_of_an_app_are_asked_for(
    typed: Type, ada: str, password_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = totp.new_seed()
    monkeypatch.setattr(totp, "new_seed", lambda: seed)
    now = int(time.time() // totp.STEP_S)
    answer(monkeypatch, totp.code(seed, now - 1), totp.code(seed, now), "000000")
    shown = typed("user", "totp", ada)
    assert shown.status == 0
    assert parse_qs(urlsplit(shown.out.split()[0]).query)["issuer"] == ["LLMOS"]
    login = ("login", ada, "--password-file", str(password_file))
    assert typed(*login).status == 4
    assert typed(*login, "--code").out.startswith("llmos_")
    assert typed(*login, "--code").status == 4
    assert typed("user", "totp", ada, "--remove", "--json").value == {"name": ada, "codes": False}
    assert typed(*login, "--json").value["token"]


def test_a_user_has_a_tenant(typed: Type) -> None:
    assert typed("user", "add", "ada", "--role", "engineer", "--tenant", "ward").status == 0
    assert typed("user", "add", "eve", "--role", "engineer", "--tenant", "No Name").status == 7
    rows = {row["name"]: row["tenant"] for row in typed("user", "ls", "--json").value}
    assert rows == {"admin": None, "ada": "ward"}
    assert typed("user", "tenant", "ada", "lab").out == "ada: tenant lab\n"
    assert "lab" in typed("user", "ls").out
    assert typed("user", "tenant", "ada", "--json").value == {"name": "ada", "tenant": None}
    assert typed("user", "tenant", "nobody", "lab").status != 0
