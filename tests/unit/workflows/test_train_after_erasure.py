"""Trainings whose data lose a person: planned, interrupted, running, with and without privacy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from tests.clinics import PERSON, erased
from tests.databases import copy_home
from tests.homes import Person, checked_books, hire, last_records, opened

from llmos.engines.dp import trainer
from llmos.engines.dp.sampling import TrainingRecord
from llmos.errors import InvalidPrivacyParameter, JobInterrupted
from llmos.system import System
from llmos.workflows import training_job
from llmos.workflows.training_request import TrainRequest
from llmos.workflows.training_view import StepView

STEPS = 8
JOB: dict[str, Any] = {
    "dataset": "clinic", "model": "tiny", "steps": STEPS, "batch": 12, "rank": 4, "max_tokens": 32,
    "checkpoint_every_s": 0.0,
}  # fmt: skip
PRIVATE, PLAIN = {"epsilon": 3.0}, {"private": False}


@pytest.fixture
def home(clinic_home: Path, tmp_path: Path) -> Path:
    copy_home(clinic_home, tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def bob(home: Path, tmp_path: Path) -> Person:
    return hire(home, "bob", "steward", tmp_path)


@dataclass
class Fits:
    """What each fit was given: whose records, and whether it went on from a checkpoint."""

    units: list[set[str | int]] = field(default_factory=list)
    resumed: list[bool] = field(default_factory=list)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Fits:
    """Watch the engine; it runs as it is."""
    seen, real = Fits(), trainer.fit

    def watched(adapter: Any, records: tuple[TrainingRecord, ...], *rest: Any, **named: Any) -> Any:
        seen.units.append({record.unit for record in records})
        seen.resumed.append(named["resume"] is not None)
        return real(adapter, records, *rest, **named)

    monkeypatch.setattr(training_job, "fit", watched)
    monkeypatch.setattr(training_job, "_CANCEL_POLL_S", 0.0)
    return seen


def run(system: System, job: str, at_step: int, act: Any) -> None:
    """Run a job and do something when it shows a step for the first time."""
    done: list[int] = []

    def on_step(view: StepView) -> None:
        if view.step == at_step and not done:
            done.append(view.step)
            act()

    system.jobs.resume(job, interrupt=Event(), on_step=on_step)


def interrupted_job(system: System, options: dict[str, Any], step: int) -> str:
    job = system.submit(system.plan(**(JOB | options)))
    interrupt = Event()

    def on_step(view: StepView) -> None:
        if view.step == step:
            interrupt.set()

    with pytest.raises(JobInterrupted):
        system.jobs.resume(job, interrupt=interrupt, on_step=on_step)
    return job


@pytest.mark.parametrize(("options", "resumed"), [(PRIVATE, True), (PLAIN, False)])
def test_an_interrupted_training_goes_on_without_the_person(
    home: Path, bob: Person, fits: Fits, options: dict[str, Any], resumed: bool
) -> None:
    """Private steps were charged and stay; unbounded ones go with their checkpoint."""
    with opened(home) as system:
        job = interrupted_job(system, options, 3)
        checkpoint = system.parts.jobs.job(job).checkpoint
        assert checkpoint is not None
    erased(home, bob)
    with opened(home) as system:
        assert (system.parts.jobs.job(job).checkpoint == checkpoint) is resumed
        assert any(path.name == checkpoint for path in home.glob("objects/??/*")) is resumed
        assert system.jobs.resume(job)["steps"] == STEPS
        before, after = fits.units
        assert before - after == {PERSON}
        assert fits.resumed == [False, resumed]
        checked_books(system)
        if resumed:
            (reservation,) = system.kernel.budget.reservations("clinic")
            assert (reservation.state, reservation.steps_done) == ("committed", STEPS)
            planned = TrainRequest.model_validate(system.parts.jobs.job(job).request)
            assert planned.units == 12
            assert reservation.mechanism == planned.plan.mechanism, "charged as planned"


@pytest.mark.parametrize(("options", "resumed"), [(PRIVATE, True), (PLAIN, False)])
@pytest.mark.parametrize("at_step", [3, STEPS])
def test_a_running_training_goes_on_without_the_person(
    home: Path, bob: Person, fits: Fits, options: dict[str, Any], resumed: bool, at_step: int
) -> None:
    with opened(home) as system:
        job = system.submit(system.plan(**(JOB | options)))
        run(system, job, at_step, lambda: erased(home, bob))
        finished = system.parts.jobs.job(job)
        assert (str(finished.state), finished.checkpoint) == ("done", None)
        if resumed and at_step == STEPS:
            assert fits.resumed == [False], "all its steps were charged before the decision"
        else:
            before, after = fits.units
            assert before - after == {PERSON}
            assert fits.resumed == [False, resumed]
        checked_books(system)


def test_a_training_can_be_stopped_right_after_an_erasure(
    home: Path, bob: Person, fits: Fits
) -> None:
    with opened(home) as system:
        job = system.submit(system.plan(**(JOB | PRIVATE)))
        interrupt = Event()

        def on_step(view: StepView) -> None:
            if view.step == 3:
                erased(home, bob)
                interrupt.set()

        with pytest.raises(JobInterrupted, match="after step 3"):
            system.jobs.resume(job, interrupt=interrupt, on_step=on_step)
        assert len(fits.units) == 1


def test_a_plan_made_afterwards_counts_who_is_left(home: Path, bob: Person, fits: Fits) -> None:
    with opened(home) as system:
        stale = system.submit(system.plan(**(JOB | PRIVATE), output="stale"))
    erased(home, bob)
    with opened(home) as system:
        with pytest.raises(InvalidPrivacyParameter, match="at most the 11 units"):
            system.plan(**(JOB | PRIVATE))
        with pytest.raises(InvalidPrivacyParameter, match="11 units"):
            system.budgets.what_if("clinic", purpose="training", batch=12, steps=1, epsilon=1.0)
        plan = system.plan(**(JOB | PRIVATE | {"batch": 11}), output="fresh")
        assert plan.request.units == 11
        assert "1 of them erased" in plan.lines()["data"]
        system.jobs.resume(system.submit(plan))
        system.jobs.resume(stale)
        assert [PERSON in units for units in fits.units] == [False, False]
        assert last_records(system, 1)[0]["details"]["model"] == "tiny"
