"""`llmos demo --json`, `llmos demo federated`, from the first line to the last, with a tiny model.

The data, commands, attacks, certificates and the server's process are the real ones; trainings last
three steps. The real thing is `make demo`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from tests.homes import books, close, run_llmos

from llmos.cli import demo, demo_federated, main
from llmos.cli.session import Session

QUICK = "--steps 3 --batch 16 --rank 2 --last-layers 1 --max-tokens 250"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    tiny_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    monkeypatch.chdir(tiny_model_folder.parent)
    monkeypatch.setenv("LLMOS_DEVICE", "cpu")
    monkeypatch.setattr(demo, "MODEL", tiny_model_folder.name)
    monkeypatch.setattr(demo, "LEAK_TRAINING", QUICK)
    monkeypatch.setattr(demo, "USEFUL_TRAINING", QUICK)

    def run(*arguments: str) -> tuple[int, str, str]:
        session = Session(home=str(tmp_path / "home"))
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
            status = main.run([*arguments], session)
        if session.opened is not None:
            close(session.opened)
        return status, out.getvalue(), err.getvalue()

    return run


@pytest.mark.slow
@pytest.mark.model
def test_the_whole_story(run: Run, tmp_path: Path) -> None:
    status, out, err = run("demo", "--json")
    assert status == 0, err
    said: dict[str, Any] = json.loads(out)
    home = tmp_path / "home"
    assert said["home"] == str(home)
    assert said["seconds"] > 0
    assert set(said["arms"]) == {demo.NONPRIVATE, demo.PRIVATE, demo.USEFUL_MODEL}
    plain, private, useful = (
        said["arms"][name] for name in (demo.NONPRIVATE, demo.PRIVATE, demo.USEFUL_MODEL)
    )
    assert plain["epsilon_ledger"] is None
    assert private["epsilon_ledger"] == pytest.approx(3, abs=0.01)
    assert useful["epsilon_ledger"] == pytest.approx(8, abs=0.02)
    assert private["epsilon_lower_bound"] <= private["epsilon_ledger"]
    for arm in (plain, private):
        assert 0 <= arm["extraction_rate"] <= 1
        assert 0 <= arm["canary_auc"] <= 1
    for arm in said["arms"].values():
        assert arm["heldout_loss"] > 0
        assert arm["base_heldout_loss"] > 0

    assert "Traceback" not in err
    for told in (
        "$ llmos init",
        "$ llmos train --data icd10-leak --model tiny --epsilon 3",
        "refused, as it must be: the envelope is not signed by",
        f"models this key may use: {demo.USEFUL_MODEL}",
        "a wrong key: refused with 401",
        "a key without the right: refused with 403",
        "secrets repeated verbatim",
    ):
        assert told in err, told

    assert run("verify", said["certificate"])[0] == 0
    assert run("verify", str(home / "reports" / "tampered.json"))[0] != 0
    assert "<svg" in Path(said["report"]).read_text()
    left = books(home)
    assert len(left.jobs) == 3
    assert all(state == "done" for _, state in left.jobs)
    assert all(held == 0 for _, _, held in left.pools)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_three_hospitals(tiny_model_folder: Path, tmp_path: Path) -> None:
    told = run_llmos(tmp_path, "demo", "federated", "--model", str(tiny_model_folder), "--json")
    assert told.returncode == 0, told.stderr
    said: dict[str, Any] = json.loads(told.stdout)
    assert said["rounds"] == demo_federated.JOB["rounds"]
    assert set(said["sites"]) == {"east", "north", "south"}
    for site in said["sites"].values():
        assert 0 < site["epsilon"] <= demo_federated.JOB["epsilon"]
        assert site["steps"] >= said["rounds"] * demo_federated.JOB["local_steps"]
        assert site["bytes_up"] > 0
        assert site["heldout_loss"] < site["base_heldout_loss"]
    for line in (
        "2 of 3 take part, 0 rounds are done",
        "loses its power (SIGKILL) after round 2",
        "3 sites",
        "4 entries of its log proven; its own keys were compared",
        "refused, as it must be: east has signed with other keys",
    ):
        assert line in told.stderr, line
    assert "Traceback" not in told.stderr
    for name in ("coordinator", *said["sites"]):
        left = books(tmp_path / name)
        assert all(held == 0 for _, _, held in left.pools)
        assert "Traceback" not in (tmp_path / f"{name}.out").read_text()
