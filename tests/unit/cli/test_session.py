"""What the commands share: the home that is opened once, and what is printed."""

from __future__ import annotations

import io
import json
from pathlib import Path

import click
import pytest
from tests.homes import close

import llmos
from llmos.cli.session import (
    Session,
    ask_new_passphrase,
    ask_secret,
    console,
    device_option,
    print_fields,
    print_json,
    print_table,
    printable,
    say,
    with_session,
)
from llmos.config import Device
from llmos.errors import HomeMissing, WrongPassphrase


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_flags_reach_the_configuration(tmp_path: Path) -> None:
    config = Session(home=str(tmp_path), device="cpu").config()
    assert (config.home, config.device) == (tmp_path, Device.CPU)


def test_the_home_is_opened_once(tmp_path: Path) -> None:
    close(llmos.create(tmp_path / "home"))
    session = Session(home=str(tmp_path / "home"), device="cpu")
    system = session.system()
    try:
        assert session.system() is system
    finally:
        close(system)


def test_a_home_that_is_missing_is_not_remembered_as_opened(tmp_path: Path) -> None:
    session = Session(home=str(tmp_path / "none"))
    with pytest.raises(HomeMissing):
        session.system()
    assert session.opened is None


def test_the_device_flag_overrides_the_configured_device(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    @device_option
    @with_session
    def shown(session: Session) -> None:
        click.echo(session.config().device)

    monkeypatch.setenv("LLMOS_DEVICE", "cuda")
    session = Session()
    shown.main(args=[], standalone_mode=False, obj=session)
    assert session.device is None
    shown.main(args=["--device", "cpu"], standalone_mode=False, obj=session)
    assert session.config().device is Device.CPU
    with pytest.raises(click.BadParameter, match="abacus"):
        shown.main(args=["--device", "abacus"], standalone_mode=False, obj=session)


def test_without_a_terminal_no_passphrase_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe\n"))
    with pytest.raises(WrongPassphrase, match="no terminal") as refused:
        ask_secret("passphrase")
    assert "LLMOS_PASSPHRASE_FILE" in refused.value.hint
    with pytest.raises(WrongPassphrase, match="no terminal") as refused:
        ask_secret("PIN")
    assert "LLMOS_PKCS11_PIN_FILE" in refused.value.hint
    with pytest.raises(WrongPassphrase, match="no terminal"):
        ask_new_passphrase()


def test_at_a_terminal_the_passphrase_is_asked_for_without_echo(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("click.termui.hidden_prompt_func", lambda _prompt: "correct horse")
    assert ask_secret("PIN") == "correct horse"
    assert ask_new_passphrase() == "correct horse"
    assert "correct horse" not in "".join(capsys.readouterr())


def test_json_is_sorted_and_keeps_every_script(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"b": "没", "a": None})
    out = capsys.readouterr().out
    assert json.loads(out) == {"a": None, "b": "没"}
    assert out.index('"a"') < out.index('"b"')
    assert "没" in out


def test_a_table_prints_cells_as_they_are_and_nothing_as_a_dash(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_table("keys", ("id", "label"), [("k1", "[/ward] [red]x :key:"), ("k2", None)])
    lines = capsys.readouterr().out.splitlines()
    assert any("[/ward] [red]x :key:" in line for line in lines)
    assert any(line.split() == ["k2", "-"] for line in lines)


def test_an_empty_table_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("API keys", ("id",), [])
    assert capsys.readouterr().out == "no API keys\n"


def test_fields_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    print_fields({"a": 1, "long": None})
    assert capsys.readouterr().out == "  a     1\n  long  None\n"


def test_no_colour_codes_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console().print("12 files", style="bold red")
    assert capsys.readouterr().out == "12 files\n"


EVIL = "data WITHOUT privacy\r\x1b[2K\x1b[1Aepsilon 1\n\x9b31m\u202e  all well\ud800"
SHOWN = r"data WITHOUT privacy\r\x1b[2K\x1b[1Aepsilon 1\n\x9b31m\u202e  all well\ud800"


def test_what_others_wrote_does_nothing_to_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_fields({"purpose": EVIL})
    assert capsys.readouterr().out == f"  purpose  {SHOWN}\n"
    say(EVIL)
    assert capsys.readouterr().out[9:] == f"{SHOWN}\n"
    print_table("jobs", ("id",), [("no\r\x1b[2Kyes",)])
    assert r"no\r\x1b[2Kyes" in capsys.readouterr().out
    assert printable("没有\u3000é\u00a0ж") == "没有\u3000é\u00a0ж"
