from __future__ import annotations

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
        entries = system.log.read(limit=1000)
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
    planned, made = plan.value, trained.value["plan"]
    assert made | {"predicted_s": 0} == planned | {"predicted_s": 0}
    assert trained.value["job"].startswith("train-")
