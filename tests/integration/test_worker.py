"""Workers in real processes: killed in a step, beside each other, and waiting for jobs."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

from tests.homes import (
    ENDLESS,
    TRAINING,
    UNITS,
    books,
    kill_after_step,
    opened,
    run_llmos,
    running,
    until,
)

STEPS = 100  # of which each tenth is shown
DETACHED = ["train", "--data", "notes", "--model", "tiny", "--epsilon", "3", "--batch", str(UNITS)]
DETACHED += ["--max-tokens", "32", "--rank", "4", "--detach"]


def wait_for_line(process: subprocess.Popen[str], beginning: str) -> str:
    """Read what a command says until a line begins like this, and return that line."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(beginning):
            return line.rstrip("\n")
    raise AssertionError(f"the command ended: {process.stderr.read()}")  # type: ignore[union-attr]


def test_a_killed_workers_job_is_finished_by_another_worker(home: Path) -> None:
    options = ("--steps", str(STEPS), "--checkpoint-every", "0", "--json")
    detached = json.loads(run_llmos(home, *DETACHED, *options).stdout)
    job_id = detached["job"]
    with running(home, "jobs", "work") as worker:
        kill_after_step(worker, 20)
    books(home, strays=2)
    with opened(home) as system:
        assert system.jobs.facts(job_id)["state"] == "interrupted"
        assert system.kernel.budget.reservation(job_id).steps_done >= 19
    (left,) = json.loads(run_llmos(home, "jobs", "work", "--once", "--json").stdout)
    assert (left["id"], left["state"], left["error"]) == (job_id, "done", None)
    assert left["result"]["steps"] == STEPS
    found = books(home, strays=2)
    assert found.models == ("tiny", "notes-private")
    with opened(home) as system:
        (reservation,) = system.kernel.budget.reservations("notes")
        assert (reservation.state, reservation.steps_done) == ("committed", STEPS)
        assert system.parts.jobs.job(job_id).attempt == 2


def test_a_second_worker_leaves_a_running_job_alone(home: Path) -> None:
    with opened(home) as system:
        first, second = (
            system.submit(system.plan(**(TRAINING | {"steps": steps}), output=name))
            for name, steps in (("first", ENDLESS), ("second", 8))
        )
        with running(home, "jobs", "work", "--once") as worker:
            until(lambda: system.jobs.facts(first)["state"] == "running")
            (left,) = system.jobs.work()
            assert (left["id"], left["state"]) == (second, "done")
            worker.send_signal(signal.SIGINT)
            said, err = worker.communicate(timeout=60)
        assert (worker.returncode, err) == (0, "")
        assert f"job {first} is interrupted: JobInterrupted: job {first} stopped after" in said
        system.jobs.cancel(first)
    assert dict(books(home).jobs) == {first: "cancelled", second: "done"}


def test_a_waiting_worker_runs_what_is_queued_later_and_ends_with_ctrl_c(home: Path) -> None:
    with running(home, "jobs", "work") as worker:
        said = run_llmos(home, *DETACHED, "--steps", "4").stdout.splitlines()
        job_id = said[-2].removeprefix("job ").removesuffix(" is queued")
        assert said[-1] == f"Next: llmos jobs work --once, or llmos jobs resume {job_id}"
        assert wait_for_line(worker, "job ") == f"job {job_id}"
        assert wait_for_line(worker, "job ") == f"job {job_id} is done"
        worker.send_signal(signal.SIGINT)
        assert worker.communicate(timeout=60) == ("", "")
        assert worker.returncode == 0
    assert books(home).jobs == ((job_id, "done"),)
