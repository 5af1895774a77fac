from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.unit.cli.conftest import Type
from tests.unit.reports.conftest import ALL_ANSWERS

from llmos.reports.questions import to_dict
from llmos.system import System


def test_people_fill_in_the_form_that_the_command_writes(
    typing: Callable[[Path], Type], measured: System, tmp_path: Path
) -> None:
    typed = typing(measured.kernel.config.home)
    form = tmp_path / "answers.toml"
    said = typed("report", "private", "--questions", str(form))
    assert (said.status, f"--answers {form}" in said.out) == (0, True)
    again = typed("report", "private", "--questions", str(form), "--json")
    assert (again.status, again.value["error"]["type"]) == (7, "DataError")

    opened = typed("report", "private", "--answers", str(form))
    assert opened.status == 0
    assert "tier 0 of 3; people must answer: curator, curator-type" in opened.out
    assert "registry.json" not in opened.out
    assert "None" not in opened.out

    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps(to_dict(ALL_ANSWERS)))
    answered = typed("report", "private", "--answers", str(answers))
    assert "tier 3 of 3, complete" in answered.out
    assert "private.registry.json" in answered.out
    found = typed("report", "private", "--answers", str(answers), "--json").value
    assert (found["registry_tier"], found["open_questions"]) == (3, [])
    shown = typed("verify", found["certificate"])
    assert "5 log entries proven" in shown.out


def test_the_form_can_be_asked_for_by_programs(
    typing: Callable[[Path], Type], measured: System, tmp_path: Path
) -> None:
    typed = typing(measured.kernel.config.home)
    form = tmp_path / "answers.toml"
    assert typed("report", "private", "--questions", str(form), "--json").value == {
        "questions": str(form)
    }
    assert form.exists()
