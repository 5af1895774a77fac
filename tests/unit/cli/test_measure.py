from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.homes import books
from tests.unit.cli.conftest import Type

from llmos.system import System


def test_a_refuted_guarantee_ends_with_a_status_of_its_own(
    typing: Callable[[Path], Type], refuted: System
) -> None:
    home = refuted.kernel.config.home
    before = books(home)
    typed = typing(home)
    for_people = typed("measure", "noiseless", "private")
    assert for_people.status == 14
    assert "FAIL" in for_people.out
    assert "Next:" not in for_people.out
    assert for_people.err.startswith("llmos: error: noiseless leaks at least epsilon ")
    assert "llmos: hint: do not release this model" in for_people.err
    for_programs = typed("measure", "noiseless", "private", "--json")
    assert for_programs.status == 14
    verdicts = [report["verdict"] for report in for_programs.value["reports"]]
    assert verdicts == ["fail", "pass"]
    refused = typed("report", "noiseless", "--json")
    assert (refused.status, refused.value["error"]["type"]) == (14, "LeakFound")
    assert books(home) == before


def test_a_model_without_a_guarantee_is_no_failure(
    typing: Callable[[Path], Type], measured: System
) -> None:
    typed = typing(measured.kernel.config.home)
    said = typed("measure", "plain")
    assert said.status == 0
    assert "NO-GUARANTEE" in said.out
    assert "Next: llmos report plain" in said.out
    reported = typed("report", "plain")
    assert reported.status == 0
    assert "no certificate" in reported.out
    assert "None" not in reported.out
    assert typed("report", "plain", "--json").value["certificate"] is None
    assert typed("report", "private", "--compare", "plain").status == 0
