"""The `llmos` command itself: how errors are printed and what the process ends with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from tests.homes import process_environment

from llmos.cli import main
from llmos.errors import HomeMissing, LlmosError, UnknownModel

MAIN = [sys.executable, "-m", "llmos.cli.main"]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes the command `report` raise an error when it is called."""

    def break_with(error: BaseException) -> None:
        from llmos.cli import report

        def fail(**_: object) -> None:
            raise error

        monkeypatch.setattr(report.report, "callback", fail)

    return break_with


def test_an_error_goes_to_standard_error_with_its_hint_and_status(
    broken: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(UnknownModel("no model 'x'", hint="`llmos model ls` lists them"))
    assert main.run(["report", "x"]) == UnknownModel.exit_status == 8
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "llmos: error: no model 'x'\nllmos: hint: `llmos model ls` lists them\n"


def test_an_error_without_a_hint_is_one_line(
    broken: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(LlmosError("it broke"))
    assert main.run(["report", "x"]) == 1
    assert capsys.readouterr() == ("", "llmos: error: it broke\n")


@pytest.mark.parametrize("hint", ["", "do this"])
def test_with_json_an_error_is_one_json_value_on_standard_output(
    broken: Any, capsys: pytest.CaptureFixture[str], hint: str
) -> None:
    broken(HomeMissing("没有 home", hint=hint))
    assert main.run(["report", "x", "--json"]) == 12
    out, err = capsys.readouterr()
    expected = {"type": "HomeMissing", "message": "没有 home"} | ({"hint": hint} if hint else {})
    assert json.loads(out) == {"error": expected}
    assert err == ""


def test_an_unexpected_error_is_not_swallowed(broken: Any) -> None:
    broken(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main.run(["report", "x"])


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), click.Abort()], ids=["ctrl-c", "abort"])
def test_a_stopped_command_ends_with_130(
    broken: Any, capsys: pytest.CaptureFixture[str], stop: BaseException
) -> None:
    broken(stop)
    assert main.run(["report", "x"]) == 130
    out, err = capsys.readouterr()
    assert (out, err.strip()) == ("", "llmos: error: stopped")


@pytest.mark.parametrize(
    ("arguments", "message", "help_of"),
    [
        (["fly"], "No such command 'fly'", "llmos"),
        (["--nonsense"], "No such option", "llmos"),
        (["report"], "Missing argument 'MODEL'", "llmos report"),
        (["model", "fly"], "No such command 'fly'", "llmos model"),
        (["key", "create", "--days", "0"], "0 is not in the range", "llmos key create"),
    ],
)
def test_a_usage_error_ends_with_2_and_names_the_help(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str, help_of: str
) -> None:
    assert main.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    error, hint = err.splitlines()
    assert error.startswith("llmos: error: ")
    assert message in error
    assert hint == f"llmos: hint: {help_of} --help"


def test_a_command_that_exits_by_itself_sets_the_status(broken: Any) -> None:
    broken(click.exceptions.Exit(14))
    assert main.run(["report", "x"]) == 14


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"], ["model", "--help"]])
def test_help_and_version_end_with_0(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(arguments) == 0
    out, err = capsys.readouterr()
    assert "llmos" in out
    assert err == ""


def test_help_names_every_noun_with_its_summary(capsys: pytest.CaptureFixture[str]) -> None:
    main.run(["--help"])
    out = capsys.readouterr().out
    for noun, (_, summary) in main.NOUNS.items():
        assert f"  {noun} " in out
        assert summary in out


def test_main_exits_with_the_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["fly"])
    assert ended.value.code == 2


def test_main_reads_the_arguments_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["llmos", "--version"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 0


def test_a_reader_that_went_away_ends_the_command_without_a_traceback(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [*MAIN, "--version"],
            stdout=write_end,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=process_environment(),
        )
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (1, "")
