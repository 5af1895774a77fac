from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.homes import UNITS, books, opened
from tests.unit.cli.conftest import Type

ASKED = ["train", "--data", "notes", "--model", "tiny", "--batch", str(UNITS), "--steps", "8"]
ASKED += ["--rank", "4", "--max-tokens", "32"]


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        ([], 6, "--no-privacy"),
        (["--epsilon", "0"], 6, "epsilon must be"),
        (["--epsilon", "-3"], 6, "epsilon must be"),
        (["--epsilon", "nan"], 6, "epsilon must be"),
        (["--epsilon", "inf"], 6, "epsilon must be"),
        (["--epsilon", "3", "--delta", "1"], 6, "delta must be"),
        (["--epsilon", "3", "--delta", "2"], 6, "delta must be"),
        (["--epsilon", "3", "--no-privacy"], 6, "epsilon must be left out"),
        (["--epsilon", "3", "--model", "nothing"], 8, "no model 'nothing'"),
        (["--epsilon", "3", "--data", "nothing"], 7, "no dataset 'nothing'"),
        (["--epsilon", "3", "--output", "../x"], 8, "cannot be the name of a model"),
        (["--epsilon", "3", "--output", "tiny"], 8, "exists already"),
        (["--epsilon", "3", "--batch", "1000"], 6, "batch must be"),
        (["--epsilon", "3", "--batch", "0"], 3, "batch"),
        (["--epsilon", "3", "--steps", "0"], 3, "steps"),
        (["--epsilon", "3", "--purpose", "advertising"], 5, "may not train-private"),
        (["--no-privacy", "--data", "ward"], 5, "may not train-without-privacy"),
        (["--epsilon", "30"], 6, "cannot pay"),
        (["--epsilon", "three"], 2, "three"),
    ],
)
def test_a_refused_training_leaves_the_home_as_it_was(
    options: list[str], status: int, said: str, typed: Type, home: Path
) -> None:
    before = books(home)
    refused = typed(*ASKED, *options)
    assert refused.status == status
    assert refused.err.startswith("llmos: error: ")
    assert said in refused.err
    assert "job" not in refused.out
    for_programs = typed(*ASKED, *options, "--json")
    assert for_programs.status == status
    if status != 2:
        assert said in for_programs.value["error"]["message"]
    assert books(home) == before


def test_a_budget_that_does_not_suffice_says_what_would(typed: Type, home: Path) -> None:
    refused = typed(*ASKED, "--epsilon", "30")
    assert refused.status == 6
    assert "llmos: hint: this would fit: epsilon " in refused.err
    assert " steps" in refused.err
    assert "noise multiplier" in refused.err
    with opened(home) as system:
        entries = system.read_log(limit=1000)
    assert entries[-1][1]["outcome"] == "failed"


def test_a_training_tells_its_plan_its_steps_and_its_end(typed: Type, home: Path) -> None:
    said = typed(*ASKED, "--epsilon", "3")
    assert (said.status, said.err) == (0, "")
    lines = said.out.splitlines()
    assert lines[0] == "Plan"
    assert any("after a crash: llmos jobs resume train-" in line for line in lines)
    steps = [line for line in lines if line.startswith("  step ")]
    assert [line.split()[1] for line in steps] == [f"{n}/8" for n in range(1, 9)]
    assert all("loss " in line and "epsilon " in line for line in steps)
    assert "model notes-private is ready" in said.out
    assert lines[-1] == "Next: llmos measure notes-private"
    assert books(home).models == ("tiny", "notes-private")


def test_the_loss_on_sensitive_data_is_not_shown(typed: Type) -> None:
    said = typed(*ASKED, "--epsilon", "3", "--data", "ward")
    assert said.status == 0
    assert said.out.count("loss hidden") == 8


def test_programs_get_one_value(typed: Type) -> None:
    plan = typed(*ASKED, "--epsilon", "3", "--plan", "--json")
    trained = typed(*ASKED, "--epsilon", "3", "--json")
    assert plan.value["epsilon_pld"] == trained.value["epsilon"] <= 3
    assert trained.value["plan"] == plan.value | {"predicted_s": trained.value["plan"]["predicted_s"]}
    assert trained.value["job"].startswith("train-")


def test_jobs_are_resumed_and_cancelled_by_name(typed: Type, home: Path) -> None:
    with opened(home) as system:
        options = {"dataset": "notes", "model": "tiny", "epsilon": 3.0, "steps": 8, "rank": 4}
        options |= {"batch": UNITS, "max_tokens": 32}
        first = system.submit(system.plan(**options, output="first"))
        second = system.submit(system.plan(**options, output="second"))
    assert {job["state"] for job in typed("jobs", "ls", "--json").value} == {"queued"}
    assert typed("jobs", "resume", first, "--json").value["model"] == "first"
    cancelled = typed("jobs", "cancel", second)
    assert cancelled.out == f"job {second} is cancelled\n"
    for job, state in ((first, "done"), (second, "cancelled")):
        for verb in ("resume", "cancel"):
            again = typed("jobs", verb, job)
            assert again.status == 11
            assert again.err.startswith(f"llmos: error: job {job} is {state} already")
    assert dict(books(home).jobs) == {first: "done", second: "cancelled"}


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
