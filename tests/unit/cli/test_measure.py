from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from tests.certified import with_adapter
from tests.homes import books
from tests.unit.cli.conftest import Type

from llmos.attacks import observations
from llmos.engines.federated import fixed_point
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


def test_what_a_site_has_sent_is_attacked_too(
    typing: Callable[[Path], Type],
    tmp_path: Path,
    tiny_model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with ExitStack() as stack:
        typed = typing(with_adapter(tmp_path, tiny_model_folder, stack).folder / "east")
        said = typed("measure", "real", "--inversion")
        assert said.status == 0, said.err
        assert "gradient, in the clear (control)" in said.out
        assert "100.0% of" in said.out
        assert "the coordinator of this job sees: gradient behind the mask\n" in said.out
        assert "8 of 8 records were used" in said.out
        assert "cut to at most 11 distinct tokens" in said.out
        assert "exact in the row 'gradient behind the mask'" in said.out
        assert "verdict on the masks: PASS" in said.out
        (found,) = typed("measure", "real", "--inversion", "--json").value["inversion"]
        assert found["report"]["verdict"] == "pass"
        assert Path(found["file"]).name == "real.inversion.json"

        def forgotten(plain: np.ndarray, _fixed: fixed_point.FixedPoint) -> np.ndarray:
            return plain

        monkeypatch.setattr(observations, "masked", forgotten)
        broken = typed("measure", "real", "--inversion")
        assert broken.status == 14
        assert "verdict on the masks: FAIL" in broken.out
        assert "the masks of this site do not hide what is behind them (real)" in broken.err
        assert typed("measure", "real", "--inversion", "--json").status == 14
        local = typed("measure", "tiny", "--inversion")
        assert local.status != 0
        assert "no federation trained tiny" in local.err
