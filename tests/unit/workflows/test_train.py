from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from tests.databases import allow, refuse
from tests.homes import (
    TRAINING,
    Books,
    checked_books,
    last_records,
    log_size,
    opened,
)

from llmos.errors import (
    BudgetExceeded,
    InvalidPrivacyParameter,
    JobCancelled,
    JobError,
    JobInterrupted,
    LedgerConflict,
    LlmosError,
    PermissionDenied,
    UnaccountableMechanism,
    UnknownJob,
    UnknownModel,
)
from llmos.jobs.jobs import Job, Jobs, JobState, Step
from llmos.kernel import pricing
from llmos.kernel.policy import Action
from llmos.models import lora
from llmos.models.loading import load_base
from llmos.system import System
from llmos.workflows.training_view import StepView

STEPS = TRAINING["steps"]


def submit(system: System, **changes: Any) -> str:
    return system.submit(system.plan(**(TRAINING | changes)))


def interrupt_at(
    system: System, job_id: str, step: int, also: Callable[[], object] = lambda: None
) -> None:
    """Run a job until a step, as Ctrl-C would end it there."""
    interrupt = Event()

    def on_step(view: StepView) -> None:
        if view.step == step:
            also()
            interrupt.set()

    system.jobs.resume(job_id, interrupt=interrupt, on_step=on_step)


def cost(system: System, job_id: str, steps: int) -> int:
    """Return what some steps of a job's mechanism cost."""
    mechanism = system.kernel.budget.reservation(job_id).mechanism
    order = system.kernel.budget.pool("notes").renyi_order
    return pricing.cost(mechanism.after(steps), order)


def test_a_training_is_charged_once_published_and_recorded(system: System) -> None:
    views: list[StepView] = []
    before = checked_books(system)
    result = system.train(on_step=views.append, **TRAINING)

    reservation = system.kernel.budget.reservations("notes")[0]
    assert (reservation.state, reservation.steps_done) == ("committed", STEPS)
    after = checked_books(system)
    assert after.pools[0] == ("notes", reservation.cost, 0)
    assert [held for _, _, held in after.pools] == [0, 0]
    assert after.models == (*before.models, "notes-private")
    assert after.jobs == ((reservation.id, "done"),)
    assert len(after.objects) == len(before.objects) + 1  # the adapter; checkpoints are gone

    entry = system.registry.model("notes-private")
    assert entry.digest == result["digest"]
    assert entry.card["epsilon"] == result["epsilon"] <= 3.0
    assert entry.card["randomness"] == "os-urandom"
    assert entry.card["self_test"] == {"gradient_norms_against_autograd": True}
    assert entry.resource.attributes["private"] is True
    assert [view.step for view in views] == list(range(1, STEPS + 1))
    assert all(view.loss is not None and view.loss > 0 for view in views)
    assert [view.epsilon for view in views] == sorted(view.epsilon or 0 for view in views)
    assert views[-1].epsilon == result["epsilon"]
    assert views[-1].seconds_left == 0

    outcomes = [(r["outcome"], r["details"].get("step")) for r in last_records(system, 6)]
    assert outcomes == [
        ("done", "submit"),
        ("admitted", "fit"),
        ("progressed", None),
        ("admitted", "before publish"),
        ("settled", "settle"),
        ("done", "publish"),
    ]


def test_training_moves_the_model(system: System) -> None:
    system.train(**TRAINING)
    entry = system.registry.model("notes-private")
    folder = system.registry.folder(system.registry.model("tiny"))
    model = load_base(folder, torch.device("cpu")).model
    with system.kernel.monitor.admit(
        system.who,
        Action.CHAT,
        entry.resource,
        key="test",
        objects={entry.location},
        charge=None,
    ) as grant:
        files = system.registry.open_adapter("notes-private", grant)
    adapter = lora.from_peft(model, files)
    assert bool((adapter.vector() != 0).any())
    assert bool(adapter.vector().isfinite().all())


def test_a_budget_that_does_not_suffice_refuses_before_any_data_is_opened(
    system: System,
) -> None:
    plan = system.plan(**(TRAINING | {"epsilon": 20.0}))
    before = checked_books(system)
    (system.kernel.config.home / "objects").rename(system.kernel.config.home / "away")
    with pytest.raises(BudgetExceeded) as caught:
        system.submit(plan)
    (system.kernel.config.home / "away").rename(system.kernel.config.home / "objects")
    assert checked_books(system) == before
    fits = caught.value.feasible
    for what in (f"epsilon {fits['epsilon']:g}", f"{fits['steps']:.0f} steps", "noise"):
        assert what in caught.value.hint
    assert 0 < fits["epsilon"] < 8
    assert last_records(system, 1)[0]["outcome"] == "failed"
    submit(system, epsilon=fits["epsilon"])  # what was said to fit does fit


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"epsilon": -1.0}, InvalidPrivacyParameter),
        ({"epsilon": float("nan")}, InvalidPrivacyParameter),
        ({"delta": 1.0}, InvalidPrivacyParameter),
        ({"model": "nothing"}, UnknownModel),
    ],
)
def test_what_cannot_be_planned_is_never_trained(
    changes: dict[str, Any], error: type[LlmosError], system: System
) -> None:
    before = checked_books(system)
    with pytest.raises(error):
        system.train(**(TRAINING | changes))
    assert checked_books(system) == before


def test_sensitive_data_never_train_without_privacy_and_the_attempt_is_recorded(
    system: System,
) -> None:
    before = checked_books(system)
    with pytest.raises(PermissionDenied, match="train-without-privacy"):
        submit(system, dataset="ward", private=False, epsilon=None)
    assert checked_books(system) == before
    record = last_records(system, 1)[0]
    assert record["action"] == "train-without-privacy"
    assert (record["resource"], record["outcome"]) == ("Dataset::ward", "denied")
    assert "no-training-without-privacy-on-sensitive-data" in record["details"]["policies"]


def test_a_purpose_that_the_data_are_not_for_is_denied(system: System) -> None:
    before = checked_books(system)
    with pytest.raises(PermissionDenied):
        submit(system, purpose="advertising")
    assert checked_books(system) == before


def test_the_loss_on_sensitive_data_is_hidden(system: System) -> None:
    views: list[StepView] = []
    system.train(on_step=views.append, **(TRAINING | {"dataset": "ward"}))
    assert [view.loss for view in views] == [None] * STEPS
    assert all(view.epsilon is not None for view in views)
    checked_books(system)


def test_training_without_privacy_charges_nothing_and_claims_nothing(system: System) -> None:
    views: list[StepView] = []
    result = system.train(
        on_step=views.append, **(TRAINING | {"private": False, "epsilon": None, "batch": 4})
    )
    assert (result["epsilon"], result["delta"]) == (None, None)
    assert all(view.epsilon is None and view.loss is not None for view in views)
    assert [(spent, held) for _, spent, held in checked_books(system).pools] == [(0, 0), (0, 0)]
    entry = system.registry.model("notes-nonprivate")
    assert (entry.card["private"], entry.card["epsilon"]) == (False, None)
    assert system.jobs.facts(system.parts.jobs.jobs()[0].id)["state"] == "done"


def test_speed_settings_change_neither_the_mechanism_nor_its_price(system: System) -> None:
    for name, microbatch_tokens in (("small", 64), ("large", 4096)):
        system.train(**TRAINING, output=name, microbatch_tokens=microbatch_tokens)
    small, large = system.kernel.budget.reservations("notes")
    assert (small.mechanism, small.cost) == (large.mechanism, large.cost)
    assert small.state == large.state == "committed"


def test_an_interrupted_run_goes_on_to_the_same_adapter_as_an_uninterrupted_one(
    system: System,
) -> None:
    whole = system.train(**TRAINING, output="whole", seed=7)
    job_id = submit(system, output="parts", seed=7)
    for step in (3, 5):
        with pytest.raises(JobInterrupted) as caught:
            interrupt_at(system, job_id, step)
        assert f"llmos jobs resume {job_id}" in caught.value.hint
        assert system.jobs.facts(job_id)["state"] == "interrupted"
        assert system.kernel.budget.reservation(job_id).steps_done == step
        checked_books(system)
    assert system.jobs.resume(job_id)["digest"] == whole["digest"]
    other = system.train(**TRAINING, output="other", seed=8)
    assert other["digest"] != whole["digest"]
    assert system.registry.model("parts").card["randomness"] == "insecure-test"
    states = {r.id: (r.state, r.steps_done) for r in system.kernel.budget.reservations("notes")}
    assert states[job_id] == ("committed", STEPS)
    checked_books(system)


def test_a_job_that_is_done_cannot_be_resumed_or_cancelled(system: System) -> None:
    system.train(**TRAINING)
    job_id = system.parts.jobs.jobs()[0].id
    before, entries = checked_books(system), log_size(system)
    for again in (system.jobs.resume, system.jobs.cancel):
        with pytest.raises(JobError, match=f"{job_id} is done already"):
            again(job_id)
    assert checked_books(system) == before
    assert log_size(system) <= entries + 1  # the failed cancellation has its record
    with pytest.raises(UnknownJob):
        system.jobs.resume("train-00000000")


def test_cancelling_a_queued_job_gives_everything_back(system: System) -> None:
    job_id = submit(system)
    reserved = system.kernel.budget.reservation(job_id).cost
    assert checked_books(system).pools[0] == ("notes", 0, reserved)
    assert system.jobs.cancel(job_id) is JobState.CANCELLED
    after = checked_books(system)
    assert [(spent, held) for _, spent, held in after.pools] == [(0, 0), (0, 0)]
    assert system.kernel.budget.reservation(job_id).state == "aborted"
    with pytest.raises(JobError, match="cancelled already"):
        system.jobs.resume(job_id)
    assert checked_books(system) == after


def test_cancelling_an_interrupted_job_charges_the_steps_that_were_run(system: System) -> None:
    job_id = submit(system)
    with pytest.raises(JobInterrupted):
        interrupt_at(system, job_id, 3)
    price = cost(system, job_id, 3)
    assert system.jobs.cancel(job_id) is JobState.CANCELLED
    reservation = system.kernel.budget.reservation(job_id)
    assert (reservation.state, reservation.steps_done) == ("committed", 3)
    assert reservation.cost == price
    assert len(checked_books(system).objects) == 6  # no checkpoint is left


def test_cancelling_without_privacy_has_nothing_to_give_back(system: System) -> None:
    job_id = submit(system, private=False, epsilon=None)
    assert system.jobs.cancel(job_id) is JobState.CANCELLED
    checked_books(system)


def test_a_running_job_that_is_asked_to_stops_and_pays_for_its_steps(
    system: System, home: Path
) -> None:
    job_id = submit(system, steps=1000, checkpoint_every_s=1e6)
    with opened(home) as other, pytest.raises(JobCancelled) as caught:
        # The other one asks after step 2; the row is looked at once a second.
        system.jobs.resume(
            job_id,
            interrupt=Event(),
            on_step=lambda view: None if view.step != 2 else _cancel(other, job_id),
        )
    reservation = system.kernel.budget.reservation(job_id)
    assert 2 <= reservation.steps_done < 1000
    assert f"after {reservation.steps_done} steps" in caught.value.message
    assert reservation.state == "committed"
    after = checked_books(system)
    assert after.jobs == ((job_id, "cancelled"),)
    assert len(after.objects) == 6


def _cancel(system: System, job_id: str) -> None:
    assert system.jobs.cancel(job_id) is JobState.RUNNING


def test_a_job_that_stops_as_soon_as_it_is_asked_to_is_cancelled(
    system: System, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = submit(system)
    run = Jobs.run
    with opened(home) as other:

        def too_late(jobs: Jobs, job: str, steps: Mapping[str, Step]) -> Job:
            monkeypatch.undo()  # what is asked for is in the books: the other one ends the job
            run(other.parts.jobs, job, steps)
            return run(jobs, job, steps)

        monkeypatch.setattr(Jobs, "run", too_late)
        assert system.jobs.cancel(job_id) is JobState.CANCELLED
    assert checked_books(system).jobs == ((job_id, "cancelled"),)


def test_everyone_runs_and_cancels_their_own_jobs_but_not_those_of_others(
    system: System, home: Path
) -> None:
    system.access.add_user("eve", ["engineer"])
    admins = submit(system, output="admins")
    with opened(home, principal="eve") as engineer:
        assert engineer.train(**TRAINING)["model"] == "notes-private"
        own = submit(engineer, output="own")
        assert engineer.jobs.cancel(own) is JobState.CANCELLED
        before = checked_books(engineer)
        for forbidden in (engineer.jobs.resume, engineer.jobs.cancel):
            with pytest.raises(PermissionDenied, match="manage-jobs"):
                forbidden(admins)
        assert checked_books(engineer) == before
    assert system.jobs.cancel(admins) is JobState.CANCELLED


def test_a_job_planned_for_other_data_is_refused(system: System) -> None:
    job_id = submit(system)
    with system.kernel.monitor.act(system.who, Action.MANAGE_JOBS, system.kernel.home) as conn:
        conn.exec_driver_sql("UPDATE datasets SET fingerprint = 'other' WHERE name = 'notes'")
    with pytest.raises(UnaccountableMechanism):
        system.jobs.resume(job_id)
    assert system.jobs.facts(job_id)["state"] == "failed"
    assert system.kernel.budget.reservation(job_id).state == "held"
    checked_books(system)


def test_a_failed_job_is_tried_again_and_charged_once(system: System) -> None:
    job_id = submit(system)
    folder = system.registry.folder(system.registry.model("tiny"))
    folder.rename(folder.with_name("away"))
    before = checked_books(system)
    with pytest.raises(LlmosError):
        system.jobs.resume(job_id)
    facts = system.jobs.facts(job_id)
    assert facts["state"] == "failed"
    assert facts["error"]
    assert checked_books(system).pools == before.pools
    folder.with_name("away").rename(folder)
    with pytest.raises(JobError, match="it is tried again for a reason"):
        system.jobs.resume(job_id)
    system.jobs.retry(job_id, reason="the model is back")
    assert system.jobs.facts(job_id)["state"] == "done"
    assert system.jobs.facts(job_id)["reservation"] == f"committed, {STEPS} steps done"
    checked_books(system)


def test_a_failed_job_is_tried_again_for_a_reason_that_is_recorded(
    system: System, home: Path
) -> None:
    system.access.add_user("eve", ["engineer"])
    job_id = submit(system)
    folder = system.registry.folder(system.registry.model("tiny"))
    folder.rename(folder.with_name("away"))
    with pytest.raises(LlmosError):
        system.jobs.resume(job_id)
    folder.with_name("away").rename(folder)
    before = checked_books(system)
    with opened(home, principal="eve") as engineer, pytest.raises(PermissionDenied):
        engineer.jobs.retry(job_id, reason="it is not mine")
    assert checked_books(system) == before
    size = log_size(system)
    assert system.jobs.retry(job_id, reason="the model is back")["steps"] == STEPS
    record = last_records(system, log_size(system) - size)[0]
    assert (record["action"], record["outcome"]) == ("train-private", "done")
    assert record["details"]["retry"] == job_id
    assert record["details"]["reason"] == "the model is back"
    assert system.jobs.facts(job_id)["reservation"] == f"committed, {STEPS} steps done"
    for again in (job_id, submit(system, output="queued")):
        state = system.jobs.facts(again)["state"]
        with pytest.raises(JobError, match=f"is {state}; only a failed job"):
            system.jobs.retry(again, reason="why not")
        assert system.jobs.facts(again)["state"] == state
    checked_books(system)


def test_checkpoints_are_charged_before_they_are_kept(system: System) -> None:
    job_id = submit(system, checkpoint_every_s=0)
    kept: list[tuple[int, Books]] = []

    def look(view: StepView) -> None:
        done = system.kernel.budget.reservation(job_id).steps_done
        kept.append((done, checked_books(system)))

    system.jobs.resume(job_id, interrupt=Event(), on_step=look)
    assert [done for done, _ in kept] == list(range(STEPS))  # one step behind the view
    assert [len(books.objects) for _, books in kept] == [6] + [7] * (STEPS - 1)


def test_a_checkpoint_that_the_job_cannot_point_to_is_not_left_behind(system: System) -> None:
    job_id = submit(system, checkpoint_every_s=0)

    def refuse_checkpoints(view: StepView) -> None:
        if view.step == 2:
            with system.kernel.store.transaction() as conn:
                refuse(conn, "UPDATE OF checkpoint", "jobs")

    with pytest.raises(Exception, match="no more"):
        system.jobs.resume(job_id, on_step=refuse_checkpoints)
    assert len(checked_books(system).objects) == 7  # the one before is still there
    with system.kernel.store.transaction() as conn:
        allow(conn, "jobs")
    assert system.jobs.retry(job_id, reason="it can be written")["steps"] == STEPS
    checked_books(system)


def test_a_settled_job_opens_no_data_again(system: System) -> None:
    """A job row put back by hand does not make a paid training run twice."""
    system.train(**TRAINING)
    job_id = system.parts.jobs.jobs()[0].id
    with system.kernel.store.transaction() as conn:
        conn.exec_driver_sql("UPDATE jobs SET state = 'running'")
        conn.exec_driver_sql("DELETE FROM models WHERE kind = 'adapter'")
        allow(conn, "job_steps", "job_steps_no_delete")
        conn.exec_driver_sql("DELETE FROM job_steps")
    with pytest.raises(LedgerConflict, match="opens no data again"):
        system.jobs.resume(job_id)
    assert system.kernel.budget.reservation(job_id).cost == cost(system, job_id, STEPS)
