from __future__ import annotations

from pathlib import Path

from tests.homes import TRAINING, UNITS, books, opened
from tests.unit.cli.conftest import Type


def test_jobs_are_resumed_and_cancelled_by_name(typed: Type, home: Path) -> None:
    with opened(home) as system:
        first = system.submit(system.plan(**TRAINING, output="first"))
        second = system.submit(system.plan(**TRAINING, output="second"))
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


def test_a_failed_job_is_retried_for_a_reason(typed: Type, home: Path) -> None:
    with opened(home) as system:
        job_id = system.submit(system.plan(**TRAINING))
        model = system.registry.folder(system.registry.model("tiny"))
    unreasoned = typed("jobs", "retry", job_id)
    assert unreasoned.status == 2
    assert "--reason" in unreasoned.err
    empty = typed("jobs", "retry", job_id, "--reason", " ")
    assert empty.status == 3
    assert empty.err.startswith("llmos: error: a job is not tried again without a reason")
    queued = typed("jobs", "retry", job_id, "--reason", "to see")
    assert queued.status == 11
    assert queued.err.startswith(f"llmos: error: job {job_id} is queued; only a failed job")
    model.rename(model.with_name("away"))
    worked = typed("jobs", "work", "--once", "--json")
    (left,) = worked.value
    assert worked.status == 11, "a job failed"
    assert (left["id"], left["state"], left["result"]) == (job_id, "failed", None)
    model.with_name("away").rename(model)
    assert typed("jobs", "work", "--once").out == "no job waits\n", "nobody asked for it"
    resumed = typed("jobs", "resume", job_id)
    assert resumed.status == 11
    assert f"llmos jobs retry {job_id} --reason TEXT" in resumed.err
    assert books(home).jobs == ((job_id, "failed"),)
    retried = typed("jobs", "retry", job_id, "--reason", "the model is back")
    assert retried.out.endswith(f"job {job_id} is done: model notes-private\n")
    again = typed("jobs", "retry", job_id, "--reason", "once more", "--json")
    assert again.status == 11
    assert (
        again.value["error"]["message"] == f"job {job_id} is done; only a failed job is tried again"
    )
    reasons = [entry["details"].get("reason") for entry in typed("log", "show", "--json").value]
    assert reasons.count("the model is back") == 1


def test_a_detached_training_is_queued_and_then_worked_on(typed: Type, home: Path) -> None:
    asked = ["train", "--data", "notes", "--model", "tiny", "--batch", str(UNITS), "--steps", "8"]
    asked += ["--rank", "4", "--max-tokens", "32", "--epsilon", "2", "--detach"]
    said = typed(*asked, "--output", "first")
    first = said.out.splitlines()[-2].split()[1]
    assert said.out.splitlines()[0] == "Plan"
    assert said.out.splitlines()[-2:] == [
        f"job {first} is queued",
        f"Next: llmos jobs work --once, or llmos jobs resume {first}",
    ]
    queued = typed(*asked, "--output", "second", "--json").value
    assert (queued["state"], queued["plan"]["steps"]) == ("queued", 8)
    second = queued["job"]
    assert dict(books(home).jobs) == {first: "queued", second: "queued"}
    assert books(home).models == ("tiny",)
    worked = typed("jobs", "work", "--once")
    lines = [line for line in worked.out.splitlines() if line.startswith("job ")]
    assert lines == [
        f"job {first}",
        f"job {first} is done",
        f"job {second}",
        f"job {second} is done",
    ]
    assert worked.out.count("  step ") == 16
    assert books(home).models == ("tiny", "first", "second")
