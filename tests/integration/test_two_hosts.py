"""Two hosts of one home: what they share is the database, the objects and the root key."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from tests.homes import ENDLESS, UNITS, books, kill_after_step, opened, run_llmos, running, until

from llmos.jobs.jobs import JobState

pytestmark = pytest.mark.postgresql
STEPS = 100  # of which each tenth is shown
TRAINED = ["train", "--data", "notes", "--model", "tiny", "--epsilon", "3", "--batch", str(UNITS)]
TRAINED += ["--max-tokens", "32", "--rank", "4", "--checkpoint-every", "0", "--detach", "--json"]


@pytest.fixture
def other(home: Path, tmp_path: Path) -> Path:
    """Set up the home on a second host: copies of its files, and the objects and models shared."""
    copy = tmp_path / "other" / "home"
    copy.mkdir(parents=True, mode=0o700)
    for path in home.iterdir():
        if path.is_file():
            shutil.copy2(path, copy)
    shutil.copytree(home / "policy", copy / "policy")
    for shared in ("objects", "models"):
        (copy / shared).symlink_to(home / shared)
    for own in ("run", "reports"):
        (copy / own).mkdir(mode=0o700)
    return copy


def test_a_dead_hosts_job_is_finished_by_another_host_and_charged_once(
    home: Path, other: Path
) -> None:
    job_id = json.loads(run_llmos(home, *TRAINED, "--steps", str(STEPS)).stdout)["job"]
    with running(home, "jobs", "work") as worker:
        kill_after_step(worker, 20)
        assert worker.returncode == -signal.SIGKILL
    said = run_llmos(other, "jobs", "work", "--once", "--json")
    (left,) = json.loads(said.stdout)
    assert (left["id"], left["state"], left["error"]) == (job_id, "done", None), said.stderr
    assert books(home, strays=2) == books(other, strays=2)
    with opened(home) as system:
        (reservation,) = system.kernel.budget.reservations("notes")
        assert (reservation.state, reservation.steps_done) == ("committed", STEPS)
        assert system.kernel.budget.pool("notes").held == 0
        assert system.parts.jobs.job(job_id).attempt == 2
        records = [entry.fields for entry in system.kernel.auditlog.entries(limit=1000)]
    settled = [record for record in records if record["outcome"] == "settled"]
    assert len(settled) == 1


def test_a_host_leaves_alone_what_another_host_runs(home: Path, other: Path) -> None:
    job_id = json.loads(run_llmos(home, *TRAINED, "--steps", str(ENDLESS)).stdout)["job"]
    with running(home, "jobs", "work", "--once") as worker, opened(other) as system:
        until(lambda: system.parts.jobs.job(job_id).state is JobState.RUNNING)
        assert json.loads(run_llmos(other, "jobs", "work", "--once", "--json").stdout) == []
        refused = run_llmos(other, "jobs", "resume", job_id)
        assert "is being run by another process" in refused.stderr
        assert dict(books(other, strays=2).jobs) == {job_id: "running"}
        worker.send_signal(signal.SIGINT)
        worker.communicate(timeout=60)
    with opened(other) as system:
        system.jobs.cancel(job_id)
    assert dict(books(home, strays=2).jobs) == {job_id: "cancelled"}
