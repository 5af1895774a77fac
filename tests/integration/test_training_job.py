"""Training jobs in real processes: killed, stopped, raced, out of space and beside others."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.disks import fill, mounted
from tests.homes import (
    ENDLESS,
    TRAINING,
    UNITS,
    books,
    close,
    kill_after_step,
    opened,
    running,
    training,
    until,
    wait_for_step,
    write_notes,
)

import llmos
from llmos.cli.conversation import running_server
from llmos.errors import JobBusy
from llmos.jobs.jobs import JobState
from llmos.kernel import pricing
from llmos.system import System

STEPS = 19  # the most of which each is shown


def only_job(system: System) -> str:
    (job,) = system.parts.jobs.jobs()
    return job.id


def assert_trained_once(home: Path, *, steps: int = STEPS, strays: int = 0) -> None:
    """Find one model, one committed reservation of all steps, and books that agree."""
    found = books(home, strays=strays)
    assert found.models == ("tiny", "notes-private")
    with opened(home) as system:
        (reservation,) = system.kernel.budget.reservations("notes")
        assert (reservation.state, reservation.steps_done) == ("committed", steps)
        assert found.pools[0] == ("notes", reservation.cost, 0)
        assert found.jobs == ((reservation.id, "done"),)
        assert system.parts.jobs.job(reservation.id).checkpoint is None
        published = [
            entry
            for _, entry in system.log.read(limit=1000)
            if entry["details"].get("step") == "publish" and entry["outcome"] == "done"
        ]
        assert len(published) == 1


@pytest.mark.parametrize(
    ("kill_after", "checkpoint_every_s", "least_steps"),
    [
        (1, 1000, 0),  # before the first checkpoint: the whole run is repeated
        (2, 0, 1),  # while checkpoints are written after every step
        (7, 0, 6),
        (STEPS, 0, STEPS - 1),  # while the last checkpoint, the adapter or the model is written
    ],
)
def test_a_killed_training_is_resumed_and_charged_once(
    kill_after: int, checkpoint_every_s: int, least_steps: int, home: Path
) -> None:
    with training(
        home, "--steps", str(STEPS), "--checkpoint-every", str(checkpoint_every_s)
    ) as process:
        shown = kill_after_step(process, kill_after)
    before = books(home, strays=2)  # a checkpoint that is not pointed to yet, or no more
    with opened(home) as system:
        job_id = only_job(system)
        job = system.parts.jobs.job(job_id)
        assert system.jobs.facts(job_id)["state"] in {"interrupted", "done"}
        if job.state is not JobState.DONE:
            reservation = system.kernel.budget.reservation(job_id)
            assert reservation.state == "held"
            assert least_steps <= reservation.steps_done <= shown
            assert before.pools[0] == ("notes", 0, reservation.cost)
            assert system.jobs.resume(job_id)["steps"] == STEPS
    assert_trained_once(home, strays=2)


def test_a_training_killed_again_and_again_gets_to_its_end(home: Path) -> None:
    with opened(home) as system:
        job_id = system.submit(system.plan(**(TRAINING | {"steps": STEPS}), checkpoint_every_s=0))
        for step in (3, 6):
            with running(home, "jobs", "resume", job_id) as process:
                shown = kill_after_step(process, step)
            assert shown - 1 <= system.kernel.budget.reservation(job_id).steps_done <= shown
        system.jobs.resume(job_id)
    assert_trained_once(home, strays=4)


def test_ctrl_c_stops_at_a_step_boundary_and_says_how_to_go_on(home: Path) -> None:
    with training(home, "--steps", "300") as process:  # many: the signal must arrive in time
        wait_for_step(process, 30)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 11
    with opened(home) as system:
        job_id = only_job(system)
        steps = system.kernel.budget.reservation(job_id).steps_done
        assert 30 <= steps < 300
        assert said.splitlines() == [
            f"llmos: error: job {job_id} stopped after step {steps}; nothing is lost",
            f"llmos: hint: go on with: llmos jobs resume {job_id}",
        ]
        assert system.jobs.facts(job_id)["state"] == "interrupted"
        books(home)
        system.jobs.resume(job_id)
    assert_trained_once(home, steps=300)


def test_while_a_training_runs_others_use_the_home_and_one_cancels_it(home: Path) -> None:
    with (
        training(home, "--steps", str(ENDLESS), "--checkpoint-every", "0.5") as process,
        opened(home) as system,
    ):
        reservations = system.kernel.budget.reservations
        until(lambda: any(held.steps_done for held in reservations("notes")))
        job_id = only_job(system)
        with pytest.raises(JobBusy, match=job_id):
            system.jobs.resume(job_id)
        assert system.jobs.facts(job_id)["state"] == "running"
        token = system.access.create_key(label="meanwhile", models=("tiny",)).token
        answer = ask(home, token)
        assert answer["usage"]["completion_tokens"] == 2
        assert process.poll() is None
        assert system.jobs.cancel(job_id) in (JobState.RUNNING, JobState.CANCELLED)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 11
        assert f"job {job_id} was cancelled after" in said
        reservation = system.kernel.budget.reservation(job_id)
        assert reservation.state == "committed"
        assert 0 < reservation.steps_done < ENDLESS
        order = system.kernel.budget.pool("notes").renyi_order
        run = reservation.mechanism.after(reservation.steps_done)
        assert reservation.cost == pricing.cost(run, order)
    found = books(home)
    assert found.models == ("tiny",)
    assert found.jobs == ((job_id, "cancelled"),)
    assert found.pools[0] == ("notes", reservation.cost, 0)


def ask(home: Path, token: str) -> dict[str, dict[str, int]]:
    """Ask the base model one question through a server in a process of its own."""
    with running_server(home) as url, httpx.Client(timeout=60) as client:
        answer = client.post(
            f"{url}/v1/chat/completions",
            headers={"Authorization": f"Bearer {token}"},
            json={
                "model": "tiny",
                "messages": [{"role": "user", "content": "asthma?"}],
                "max_tokens": 2,
                "temperature": 0,
            },
        )
        assert answer.status_code == 200, answer.text
        found: dict[str, dict[str, int]] = answer.json()
        return found


def test_a_full_disk_stops_a_training_and_its_last_checkpoint_stays(home: Path) -> None:
    """The limit on file sizes falls below a checkpoint's size while the training runs."""
    options = ("--steps", str(STEPS), "--checkpoint-every", "0", "--rank", "256")
    with training(home, *options) as process:
        wait_for_step(process, 3)
        checkpoint = max(path.stat().st_size for path in home.glob("objects/??/*"))
        assert checkpoint > 5_000_000  # so that the databases stay below the limit
        limit = checkpoint - 100_000
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        _, said = process.communicate(timeout=60)
    assert_stopped_by_a_full_disk(home, process.returncode, said)
    with opened(home) as system:
        system.jobs.retry(only_job(system), reason="there is room again")
    assert_trained_once(home)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of a few megabytes."""
    with mounted(tmp_path / "disk") as folder:
        yield folder


@pytest.mark.sqlite("its files lie on the full disk")
def test_a_disk_without_any_room_stops_a_training_which_goes_on_afterwards(
    small_disk: Path, tiny_model_folder: Path
) -> None:
    home = small_disk / "home"
    make_home(home, tiny_model_folder)
    ballast = small_disk / "ballast"
    with training(home, "--steps", str(STEPS), "--checkpoint-every", "0") as process:
        wait_for_step(process, 3)
        fill(ballast)
        _, said = process.communicate(timeout=60)
    ballast.unlink()
    # Without any room not even the key of a checkpoint that nothing points to can be deleted:
    # `llmos vault sweep` does that later.
    assert_stopped_by_a_full_disk(home, process.returncode, said, strays=1)
    with opened(home) as system:
        job_id = only_job(system)
        if system.jobs.facts(job_id)["state"] == "failed":  # there was room to say so
            system.jobs.retry(job_id, reason="there is room again")
        else:
            system.jobs.resume(job_id)
    assert_trained_once(home, strays=1)


def make_home(home: Path, model: Path) -> None:
    """Make a home with the model `tiny` and the dataset `notes`."""
    system = llmos.create(home, device="cpu", threads=1)
    system.pull(str(model), name="tiny")
    notes = write_notes(home.parent / "notes.jsonl")
    system.import_data(
        notes,
        name="notes",
        unit="patient_id",
        text="text",
        classification="synthetic",
        epsilon=8,
        delta=1e-5,
        holdout=0,
    )
    assert system.datasets.card("notes").units == UNITS
    close(system)


def assert_stopped_by_a_full_disk(home: Path, status: int, said: str, *, strays: int = 0) -> None:
    assert "Traceback" not in said, said
    assert status == 12, said
    assert said.startswith("llmos: error: "), said
    assert "there is no room" in said
    assert "llmos: hint:" in said
    found = books(home, strays=strays)
    with opened(home) as system:
        job_id = only_job(system)
        job = system.parts.jobs.job(job_id)
        assert system.jobs.facts(job_id)["state"] in {"failed", "interrupted"}
        assert job.checkpoint in found.objects  # the one before
        reservation = system.kernel.budget.reservation(job_id)
        assert (reservation.state, found.pools[0]) == ("held", ("notes", 0, reservation.cost))
        assert 2 <= reservation.steps_done < STEPS
