"""The resident trainer asks its home's policy before each round, by what the log has then."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from sqlalchemy import update
from tests.certified import adapter_of
from tests.homes import TRAINING, Person, checked_books, hire, last_records, opened, until
from tests.unit.federations.test_manifest import FIELDS, KEY, SHARED

from llmos.engines.dp import rounds, run
from llmos.engines.dp.sampling import TrainingRecord
from llmos.engines.dp.trainer import StepReport
from llmos.errors import InvalidPrivacyParameter
from llmos.federations import invitations
from llmos.federations import manifest as manifests
from llmos.federations.invitations import InvitationState
from llmos.federations.tables import site_jobs
from llmos.kernel import monitor
from llmos.kernel.budget import ReservationState
from llmos.kernel.policy import Action
from llmos.system import System
from llmos.workflows import (
    consent,
    masked_round,
    resident_trainer,
    site_plan,
    site_settlement,
    site_training,
)
from llmos.workflows.federated_round import Task, Vector
from llmos.workflows.site_training import Happened, SiteTraining

JOB = FIELDS["id"]
STEPS = FIELDS["local"]["steps"]
NIGHTS = """@id("nights") forbid (principal, action == Action::"federate", resource)
unless { context.hour_utc >= 20 || context.hour_utc < 6 };"""


class Clock(datetime):
    """A clock that stands at an hour."""

    hour_now = 22

    @classmethod
    def now(cls, tz: Any = None) -> Self:
        return cls(2026, 11, 24, cls.hour_now, 30, tzinfo=tz)


@pytest.fixture
def bob(home: Path, tmp_path: Path) -> Person:
    return hire(home, "bob", "steward", tmp_path)


def rule(system: System, bob: Person, name: str, text: str) -> None:
    """Add a rule to a home's policy."""
    (system.kernel.config.home / f"policy/{name}.cedar").write_text(text)
    asked = system.policies.propose(reason="the machine is needed by day")
    with bob.at_work() as his:
        his.approvals.decide(asked.id, approve=True)


@pytest.fixture
def site(home: Path, bob: Person, monkeypatch: pytest.MonkeyPatch) -> Iterator[System]:
    """Open a home that trains at night only; it is night."""
    with opened(home) as system:
        rule(system, bob, "nights", NIGHTS)
    for module in (site_training, resident_trainer):
        monkeypatch.setattr(module, "datetime", Clock)
    monkeypatch.setattr(Clock, "hour_now", 22)
    with opened(home) as system:
        yield system


@pytest.fixture
def start(site: System, tiny_model_folder: Path) -> Vector:
    """Let a coordinator propose a job, and return its first weights."""
    return propose(site, tiny_model_folder)


def propose(site: System, model: Path, **more: Any) -> Vector:
    adapter, fields = adapter_of(model)
    digest = site.registry.model(TRAINING["model"]).digest
    asked = FIELDS | fields | {"model_digest": digest} | more
    signed = manifests.sign(manifests.parse(asked), KEY)
    with site.kernel.store.transaction() as conn:
        invitations.receive(conn, signed, "research.example")
    return np.asarray(adapter.vector().numpy())


def work(site: System, job_id: str = JOB) -> tuple[SiteTraining, list[Happened]]:
    """Start the trainer of the job as it is now."""
    told: list[Happened] = []
    training = made(site, told.append, job_id)
    training.start()
    return training, told


def made(site: System, tell: Callable[[Happened], None], job_id: str = JOB) -> SiteTraining:
    job = invitations.invitation(site.kernel.store, job_id)
    plan = job.plan or site_plan.make_plan(job.manifest, site.datasets.card("notes"))
    return SiteTraining(job, plan, site.parts, tell)


def saw(told: list[Happened], what: str, times: int = 1) -> Happened:
    until(lambda: [one.what for one in told].count(what) >= times or "failed" in str(told))
    assert what in [one.what for one in told], told
    return [one for one in told if one.what == what][-1]


def task(site: System, number: int, job_id: str = JOB) -> Task:
    job = invitations.invitation(site.kernel.store, job_id)
    return Task(
        job_id, job.manifest.digest, number, 1, "ab" * 32, dict.fromkeys(FIELDS["sites"], 24)
    )


def test_policy_holds_during_a_job_and_what_was_run_is_settled(
    site: System, start: Vector, monkeypatch: pytest.MonkeyPatch
) -> None:
    consent.approve(JOB, site.who, site.parts)
    training, told = work(site)
    saw(told, "admitted")
    training.train(task(site, 0), start)
    saw(told, "trained")
    monkeypatch.setattr(Clock, "hour_now", 7)  # the night is over
    training.train(task(site, 1), start)
    assert "may not federate" in saw(told, "failed").error
    ends = [(record["action"], record["outcome"]) for record in last_records(site, 2)]
    assert ends == [("federate", "denied"), ("federate", "failed")]
    budget = site.kernel.budget
    assert budget.reservation(JOB).steps_done == STEPS
    # by day no data is opened for it, and its hold is given back all the same
    site_settlement.release(invitations.invitation(site.kernel.store, JOB), site.parts)
    reservation = budget.reservation(JOB)
    assert (reservation.state, reservation.mechanism.steps) == (ReservationState.COMMITTED, STEPS)
    pool, again = budget.pool("notes"), budget.recompute("notes")
    assert (pool.spent, pool.held) == (again.spent, 0)


def test_what_was_trained_by_night_is_published_by_day(
    site: System, start: Vector, monkeypatch: pytest.MonkeyPatch
) -> None:
    consent.approve(JOB, site.who, site.parts)
    training, told = work(site)
    training.train(task(site, 0), start)
    saw(told, "trained")
    monkeypatch.setattr(Clock, "hour_now", 7)
    training.finish(start)
    saw(told, "ended")
    card = site.registry.model(FIELDS["output"]).card
    assert (card["dataset"], card["steps"]) == ("notes", STEPS)
    assert site.kernel.budget.reservation(JOB).state is ReservationState.COMMITTED


def test_a_job_that_was_withdrawn_begins_no_round(site: System, start: Vector) -> None:
    consent.approve(JOB, site.who, site.parts)
    training, told = work(site)
    saw(told, "admitted")
    consent.withdraw(JOB, site.who, site.parts, reason="a patient objected")
    training.train(task(site, 0), start)
    assert f"{JOB} is withdrawn" in saw(told, "failed").error
    assert site.kernel.budget.reservation(JOB).steps_done == 0


def test_a_job_that_was_withdrawn_during_its_last_step_keeps_no_update(
    site: System, start: Vector, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watched(*given: Any, **named: Any) -> Any:
        trained = rounds.train_round(*given, **named)
        consent.withdraw(JOB, site.who, site.parts, reason="a patient objected")
        return trained

    monkeypatch.setattr(resident_trainer, "train_round", watched)
    consent.approve(JOB, site.who, site.parts)
    training, told = work(site)
    training.train(task(site, 0), start)
    assert f"{JOB} is withdrawn" in saw(told, "failed").error
    checked_books(site)  # no object that nothing refers to


@pytest.mark.parametrize("number", [0, 1])
def test_a_round_that_is_over_is_not_trained_again(
    site: System, start: Vector, number: int
) -> None:
    consent.approve(JOB, site.who, site.parts)
    training, told = work(site)
    training.train(task(site, 1), start)
    saw(told, "trained")
    kept = invitations.invitation(site.kernel.store, JOB)
    training._asked.clear()
    training.train(task(site, number), start)
    assert "was trained here before" in saw(told, "failed").error
    assert site.kernel.budget.reservation(JOB).steps_done == STEPS
    now = invitations.invitation(site.kernel.store, JOB)
    assert (now.update_round, now.update_object) == (1, kept.update_object)


@pytest.mark.usefixtures("start")
@pytest.mark.parametrize("state", [InvitationState.APPROVED, InvitationState.RUNNING])
def test_a_row_that_says_approved_without_an_act_runs_nothing(
    site: System, state: InvitationState
) -> None:
    job = invitations.invitation(site.kernel.store, JOB)
    plan = site_plan.make_plan(job.manifest, site.datasets.card("notes"))
    with site.kernel.store.transaction() as conn:
        conn.execute(update(site_jobs).values(state=state, decider=site.who.id, plan=plan.text))
    before = site.kernel.budget.pool("notes")
    _training, told = work(site)
    assert "a decision" in saw(told, "failed").error
    assert site.kernel.budget.pool("notes") == before
    assert not any(record["action"] == "federate" for record in last_records(site, 5))


@pytest.mark.usefixtures("start")
def test_when_and_by_whom_a_job_was_admitted_is_kept(site: System) -> None:
    consent.approve(JOB, site.who, site.parts)
    training, told = work(site)
    saw(told, "admitted")
    plan = invitations.invitation(site.kernel.store, JOB).plan
    assert plan is not None
    assert plan.admitted_at == datetime(2026, 11, 24, 22, 30, tzinfo=UTC).isoformat()
    assert plan.consent == site.who.id
    training.stop()


def shared(multiplier: float) -> dict[str, Any]:
    noise = {"multiplier": multiplier, "honest": 2}
    return SHARED | {"privacy": SHARED["privacy"] | {"shared": noise}}


def test_a_noisy_sum_is_kept_as_it_was_sent(site: System, tiny_model_folder: Path) -> None:
    start = propose(site, tiny_model_folder, **shared(2.0))
    consent.approve(JOB, site.who, site.parts)
    training, told = work(site)
    training.train(task(site, 0), start)
    saw(told, "trained")
    update = training.update(0)
    assert update is not None
    assert update.dtype == np.int32
    grid = masked_round.grid_of(task(site, 0), training.job.manifest)
    assert grid.std == pytest.approx(2.0 * grid.sensitivity / math.sqrt(2), rel=1e-3)
    # most of it is noise: 24 units of which one moves it by less than a third of a noisy entry
    assert update.std() == pytest.approx(grid.std, rel=0.5)
    assert site.kernel.budget.reservation(JOB).steps_done == 1
    training.stop()
    again, told = work(site)  # the agent was started anew
    saw(told, "admitted")
    kept = again.update(0)
    assert kept is not None
    assert kept.dtype == np.int32
    assert np.array_equal(kept, update)  # the same sum under other noise would be told twice
    assert site.kernel.budget.reservation(JOB).steps_done == 1
    again.stop()


def test_a_site_that_the_shared_noise_does_not_hide_takes_no_part(
    site: System, tiny_model_folder: Path
) -> None:
    propose(site, tiny_model_folder, **shared(0.6))
    job, card = invitations.invitation(site.kernel.store, JOB), site.datasets.card("notes")
    with pytest.raises(InvalidPrivacyParameter, match="at most the job's 3: with 24 units"):
        site_plan.make_plan(job.manifest, card)


class Killed(BaseException):
    """What ends a process at once."""


def die(*_: object, **__: object) -> None:
    raise Killed


@pytest.fixture
def killed(site: System, tiny_model_folder: Path) -> System:
    """Kill the process of an approved job when the ledger has just reserved its cost."""
    propose(site, tiny_model_folder)
    consent.approve(JOB, site.who, site.parts)
    training = made(site, die)
    with pytest.MonkeyPatch.context() as dying:
        dying.setattr(monitor, "Grant", die)
        with pytest.raises(Killed):
            training._work_under_grant()
    assert site.kernel.budget.reservation(JOB).state is ReservationState.HELD
    return site


def test_a_job_whose_process_was_killed_at_its_admission_gives_back_its_hold(
    killed: System,
) -> None:
    left = consent.withdraw(JOB, killed.who, killed.parts, reason="a patient objected")
    site_settlement.release(left, killed.parts)
    assert killed.kernel.budget.reservation(JOB).state is ReservationState.ABORTED
    assert killed.kernel.budget.pool("notes").held == 0


def test_a_job_whose_process_was_killed_at_its_admission_goes_on(
    killed: System, bob: Person
) -> None:
    """Also when the units that are left would need other noise: it was reserved for that."""
    erase(killed, bob, "p3")
    before = killed.kernel.budget.reservation(JOB).mechanism
    training, told = work(killed)
    saw(told, "admitted")
    assert killed.kernel.budget.reservation(JOB).mechanism == before
    training.stop()


@pytest.mark.usefixtures("start")
def test_a_job_that_is_not_admitted_in_the_end_counts_in_no_year(
    site: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    consent.approve(JOB, site.who, site.parts)
    monkeypatch.setattr(Clock, "hour_now", 7)  # the night has ended since policy was asked
    _training, told = work(site)
    assert "may not federate" in saw(told, "failed").error
    with site.kernel.store.transaction() as conn:
        invitations.change(conn, JOB, InvitationState.RUNNING, state=InvitationState.FAILED)
    failed = invitations.invitation(site.kernel.store, JOB)
    site_settlement.release(failed, site.parts)
    assert invitations.invitation(site.kernel.store, JOB).plan is None
    assert site.kernel.budget.pool("notes").held == 0


RULE = """@id("small-jobs") permit (
  principal == Principal::"spiffe://research.example/authority",
  action == Action::"federate", resource == Dataset::"notes")
when { context.epsilon_year_millionths <= 3000000 };"""
LATER = "fed-ffffffffffffffff"


@pytest.fixture
def ruled(site: System, home: Path, bob: Person) -> Iterator[System]:
    """Open the home under a rule that admits jobs up to an epsilon a year without a steward."""
    rule(site, bob, "small-jobs", RULE)
    with opened(home) as system:
        yield system


def test_what_is_admitted_later_ends_no_job(
    ruled: System, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One job stays below the year's limit; a steward takes a second one, which goes beyond it."""
    short = {"rounds": 1, "spare_rounds": 1}
    start = propose(ruled, tiny_model_folder, **short)
    training, told = work(ruled)
    saw(told, "admitted")
    monkeypatch.setattr(Clock, "hour_now", 23)
    propose(ruled, tiny_model_folder, id=LATER, **short)
    job, card = invitations.invitation(ruled.kernel.store, LATER), ruled.datasets.card("notes")
    plan = site_plan.make_plan(job.manifest, card)
    context = site_plan.policy_context(job, plan, None, ruled.parts, at=Clock.now(UTC))
    asks = site_plan.coordinator_principal(job.manifest)
    policy = ruled.kernel.policy
    assert not policy.decide(asks, Action.FEDERATE, card.resource, context).allowed
    consent.approve(LATER, ruled.who, ruled.parts)
    second, accepted = work(ruled, LATER)
    saw(accepted, "admitted")
    training.train(task(ruled, 0), start)
    saw(told, "trained")
    training.stop()
    training, told = work(ruled)  # the agent is started anew
    saw(told, "admitted")
    training.finish(start)
    saw(told, "ended")
    assert ruled.kernel.budget.reservation(JOB).state is ReservationState.COMMITTED
    second.stop()


def erase(site: System, bob: Person, unit: str) -> None:
    asked = site.data.erase(unit, reason="request 17", datasets=("notes",))
    with bob.at_work() as his:
        his.approvals.decide(str(asked["id"]), approve=True)


def in_memory(unit: str) -> int:
    """Count the encoded records of a unit that are anywhere in this process."""
    gc.collect()
    records = [one for one in gc.get_objects() if type(one) is TrainingRecord]
    return sum(record.unit == unit for record in records)


def test_who_is_erased_between_two_rounds_is_trained_on_no_more(
    site: System, bob: Person, start: Vector, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[int] = []
    others = in_memory("p3")  # of other tests

    def watched(adapter: Any, records: Any, *rest: Any) -> Any:
        prepared.append(len({record.unit for record in records}))
        return run.prepare(adapter, records, *rest)

    monkeypatch.setattr(resident_trainer, "prepare", watched)
    consent.approve(JOB, site.who, site.parts)
    training, told = work(site)
    training.train(task(site, 0), start)
    saw(told, "trained")
    assert in_memory("p3") == others + 1
    erase(site, bob, "p3")
    until(lambda: in_memory("p3") <= others)  # also while there is no round
    training.train(task(site, 1), start)
    saw(told, "trained", times=2)
    assert prepared == [24, 23]
    assert in_memory("p3") <= others
    assert site.kernel.budget.reservation(JOB).steps_done == 2 * STEPS
    training.stop()


PLAIN = {"privacy": None, "aggregation": {"kind": "plain"}}


@pytest.mark.parametrize(
    ("terms", "at_step", "units"),
    [({}, 1, [24, 23]), ({}, STEPS, [24]), (PLAIN, 1, [24, 23]), (PLAIN, STEPS, [24, 23])],
)
def test_who_is_erased_during_a_round_ends_it(
    site: System,
    bob: Person,
    tiny_model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    terms: dict[str, Any],
    at_step: int,
    units: list[int],
) -> None:
    """All steps of a round stay if they were charged before; without privacy nothing stays."""
    trained: list[int] = []

    def watched(prepared: run.Run, *rest: Any, **named: Any) -> Any:
        trained.append(len({record.unit for record in prepared.records}))

        def on_step(report: StepReport) -> None:
            if len(trained) == 1 and report.step == at_step:
                erase(site, bob, "p3")

        return rounds.train_round(prepared, *rest, **named, on_step=on_step)

    monkeypatch.setattr(resident_trainer, "train_round", watched)
    start = propose(site, tiny_model_folder, **terms)
    consent.approve(JOB, site.who, site.parts)
    training, told = work(site)
    training.train(task(site, 0), start)
    saw(told, "trained")
    assert trained == units
    if not terms:
        assert site.kernel.budget.reservation(JOB).steps_done == len(units) * STEPS
    training.stop()


@pytest.mark.usefixtures("start")
def test_a_dataset_without_units_is_refused(site: System) -> None:
    job, card = invitations.invitation(site.kernel.store, JOB), site.datasets.card("notes")
    with pytest.raises(InvalidPrivacyParameter, match="units left in notes must be at least 1"):
        site_plan.make_plan(job.manifest, replace(card, erased_units=card.units))
