"""`llmos data erase` and `llmos data receipt`, typed by two people."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.clinics import PERSON
from tests.databases import copy_home
from tests.unit.cli.conftest import Type


@pytest.fixture
def clinic(clinic_home: Path, tmp_path: Path, typing: Callable[[Path], Type]) -> Type:
    copy_home(clinic_home, tmp_path / "home")
    return typing(tmp_path / "home")


@pytest.fixture
def bobs_key(clinic: Type, tmp_path: Path) -> Path:
    assert clinic("user", "add", "bob", "--role", "steward").status == 0
    file = tmp_path / "bob.key"
    file.touch(mode=0o600)
    file.write_text(clinic("key", "create", "--user", "bob", "--json").value["token"])
    return file


@pytest.fixture
def named(tmp_path: Path) -> str:
    """Write the person's name to a file."""
    file = tmp_path / "person"
    file.write_text(f"\n{PERSON}\n")
    return str(file)


def test_two_people_erase_a_person_and_anyone_verifies_the_receipt(
    clinic: Type, bobs_key: Path, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = clinic("data", "erase", "--unit-file", named, "--reason", "request 17")
    assert asked.status == 0, asked.err
    assert "one person from clinic, study; nothing is erased yet" in asked.out
    assert PERSON not in asked.out
    approval = asked.out.split(":")[0]
    assert PERSON not in clinic("approval", "show", approval, "--json").out
    monkeypatch.setenv("LLMOS_API_KEY_FILE", str(bobs_key))
    approved = clinic("approval", "approve", approval)
    assert "erase of one person from clinic, study" in approved.out
    file = approved.out.partition("Signed receipt: ")[2].strip()
    assert "erased_units          1" in clinic("data", "show", "clinic").out
    verified = clinic("verify", file)
    assert "verified" in verified.out
    assert "No trained model is untrained" in verified.out
    again = clinic("data", "receipt", approval, "--out", str(tmp_path / "out"), "--json").value
    assert Path(again["receipt"]).read_bytes() == Path(file).read_bytes()
    assert clinic("verify", again["receipt"], "--json").value["approval"] == approval
    assert "llmos verify" in clinic("data", "receipt", approval).out
    twice = clinic("data", "erase", "--unit-file", named, "--reason", "request 17")
    assert (twice.status, approval in twice.err) == (4, True)


def test_the_person_may_come_from_the_standard_input(
    clinic: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(PERSON.encode()))
    monkeypatch.setattr("sys.stdin", stdin)
    asked = clinic(
        "data", "erase", "study", "--unit-file", "-", "--reason", "request 17", "--json"
    ).value
    assert (asked["act"], asked["subject"]) == ("erase", "one person from study")


def test_the_person_may_be_named_in_the_command(clinic: Type) -> None:
    asked = clinic("data", "erase", "--unit", "p3", "--reason", "request 17")
    assert "one person from notes, ward" in asked.out


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "names 0 people"), (b"a\nb\n", "names 2 people"), (b"\xff", "not UTF-8")],
)
def test_a_file_names_one_person(clinic: Type, tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "people"
    file.write_bytes(content)
    refused = clinic("data", "erase", "--unit-file", str(file), "--reason", "request 17")
    assert (refused.status, said in refused.err) == (7, True)
    assert clinic("approval", "ls", "--json").value == []


@pytest.mark.parametrize("both", [True, False])
def test_the_person_is_named_once(clinic: Type, named: str, both: bool) -> None:
    options = ("--unit", "p3", "--unit-file", named) if both else ()
    refused = clinic("data", "erase", *options, "--reason", "request 17")
    assert (refused.status, "either --unit-file or --unit" in refused.err) == (2, True)
