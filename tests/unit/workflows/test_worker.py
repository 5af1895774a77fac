"""A worker takes what waits; here a job's run is a function, so that its end can be chosen."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from sqlalchemy import update
from tests.databases import open_store

from llmos.errors import DataError, JobCancelled, JobInterrupted, JobOvertaken
from llmos.jobs import lease
from llmos.jobs.jobs import Job, Jobs, JobState
from llmos.jobs.tables import jobs
from llmos.kernel import schema
from llmos.kernel.store import Store
from llmos.workflows import worker
from llmos.workflows.ctrl_c import stopped_by_ctrl_c

Behaviour = Callable[[Job], object]


class Queue:
    """Jobs of which each does what the test said, and a worker's account of them."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.folder = folder
        self.store = store
        self.jobs = Jobs(store, folder)
        self.behaviours: dict[str, Behaviour] = {}
        self.ran: list[str] = []
        self.reports: list[tuple[str, JobState, str | None]] = []
        self.interrupt = Event()

    def submit(self, behaviour: Behaviour) -> str:
        """Queue a job that is newer than all others."""
        with self.store.transaction() as conn:
            job_id = self.jobs.submit(conn, "train", "erin", {})
            at = f"2026-01-01T00:00:{len(self.behaviours):02}.000Z"
            conn.execute(update(jobs).filter_by(id=job_id).values(created_at=at))
        self.behaviours[job_id] = behaviour
        return job_id

    def end(self, job: Job, state: JobState = JobState.DONE) -> None:
        with self.store.transaction() as conn:
            self.jobs.finish(conn, job, state, {})

    def run(self, job_id: str) -> None:
        def step(job: Job, _results: Mapping[str, Any]) -> dict[str, Any]:
            self.ran.append(job_id)
            self.behaviours[job_id](job)
            return {}

        with stopped_by_ctrl_c(self.interrupt):
            self.jobs.run(job_id, {"step": step})

    def work(self, *, once: bool = True) -> None:
        def report(job: Job, error: str | None) -> None:
            self.reports.append((job.id, job.state, error))

        worker.work(self.jobs, self.run, report, once=once, interrupt=self.interrupt)


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    with closing(open_store(tmp_path / "kernel.db", schema.KERNEL)) as store:
        yield Queue(tmp_path, store)


def raising(error: BaseException) -> Behaviour:
    def fail(_job: Job) -> None:
        raise error

    return fail


def test_jobs_are_run_oldest_first_and_the_worker_ends_when_none_waits(queue: Queue) -> None:
    ids = [queue.submit(queue.end) for _ in range(3)]
    queue.work()
    assert queue.ran == ids
    assert queue.reports == [(job_id, JobState.DONE, None) for job_id in ids]
    queue.work()
    assert queue.ran == ids


def test_what_a_job_queues_is_run_too(queue: Queue) -> None:
    def submit_another(job: Job) -> None:
        queue.submit(queue.end)
        queue.end(job)

    queue.submit(submit_another)
    queue.work()
    assert [state for _, state, _ in queue.reports] == [JobState.DONE] * 2


def test_a_job_that_fails_is_reported_in_our_own_words_and_the_next_one_is_run(
    queue: Queue,
) -> None:
    def cancelled(job: Job) -> None:
        queue.end(job, JobState.CANCELLED)
        raise JobCancelled("it was cancelled")

    ids = [
        queue.submit(behaviour)
        for behaviour in (
            raising(DataError("the file is gone")),
            raising(RuntimeError("Maria Lopez has asthma")),
            cancelled,
            queue.end,
        )
    ]
    queue.work()
    assert queue.ran == ids
    assert [report[1:] for report in queue.reports] == [
        (JobState.FAILED, "DataError: the file is gone"),
        (JobState.FAILED, "RuntimeError"),
        (JobState.CANCELLED, "JobCancelled: it was cancelled"),
        (JobState.DONE, None),
    ]


def test_an_interrupted_job_is_gone_on_with_and_a_failed_one_is_not(queue: Queue) -> None:
    interrupted, failed = (queue.submit(queue.end) for _ in range(2))
    for job_id, error in ((interrupted, JobInterrupted("stop")), (failed, DataError("broken"))):
        queue.behaviours[job_id] = raising(error)
        with pytest.raises(type(error)):
            queue.run(job_id)
        queue.behaviours[job_id] = queue.end
    queue.work()
    assert queue.ran == [interrupted, failed, interrupted]


@pytest.mark.sqlite("its lock file")
def test_a_job_that_another_process_runs_is_left_to_it(queue: Queue) -> None:
    running, waiting = (queue.submit(queue.end) for _ in range(2))
    with lease.hold(queue.folder / "run", running):
        queue.work()
    assert queue.ran == [waiting]
    queue.work()
    assert queue.ran == [waiting, running]


@pytest.mark.sqlite("its lock file")
def test_a_job_that_another_process_takes_first_is_no_news(queue: Queue) -> None:
    def end(job: Job, _results: Mapping[str, Any]) -> dict[str, Any]:
        queue.end(job)
        return {}

    def overtaken(job: Job) -> None:
        (queue.folder / "run" / f"{job.id}.lock").unlink()
        queue.jobs.run(job.id, {"step": end})

    with pytest.raises(JobOvertaken):
        queue.run(queue.submit(overtaken))
    queue.submit(overtaken)
    queue.work()
    assert len(queue.ran) == 2
    assert queue.reports == []


def test_a_job_is_not_taken_again_before_someone_has_changed_it(queue: Queue) -> None:
    """A disk without room can keep a failure from being recorded: the job seems interrupted."""
    job_id = queue.submit(raising(JobInterrupted("it stops by itself")))

    def change(_job: Job) -> None:
        queue.behaviours[job_id] = queue.end
        with queue.store.transaction() as conn:
            queue.jobs.set_checkpoint(conn, queue.jobs.job(job_id), "ab12")
        raise DataError("failed")

    queue.work()
    assert queue.ran == [job_id]
    changing = queue.submit(change)
    queue.work()
    assert queue.ran == [job_id, job_id, changing, job_id]


def test_a_waiting_worker_runs_what_comes_until_ctrl_c(queue: Queue) -> None:
    looks = 0

    class Looked(Event):
        """A wait that is over at once: a job has come, or Ctrl-C."""

        def wait(self, timeout: float | None = None) -> bool:
            nonlocal looks
            assert timeout is not None
            looks += 1
            if looks < 3:
                queue.submit(queue.end)
                return False
            os.kill(os.getpid(), signal.SIGINT)
            return super().wait(60)

    queue.interrupt = Looked()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        queue.work(once=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [state for _, state, _ in queue.reports] == [JobState.DONE] * 2


@pytest.mark.parametrize("once", [True, False])
def test_ctrl_c_stops_the_job_at_a_boundary_and_then_the_worker(queue: Queue, once: bool) -> None:
    def press(_job: Job) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        assert queue.interrupt.wait(60)
        raise JobInterrupted("stopped after step 2")

    pressed, waiting = queue.submit(press), queue.submit(queue.end)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        queue.work(once=once)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert queue.reports == [(pressed, JobState.RUNNING, "JobInterrupted: stopped after step 2")]
    assert queue.jobs.job(waiting).state is JobState.QUEUED
