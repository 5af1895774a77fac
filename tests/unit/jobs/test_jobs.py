"""Jobs run in real processes that are really killed; see `tests/jobs.py`."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.databases import open_store
from tests.jobs import Home, Results, raising, returning, unexpected

from llmos.errors import (
    DataError,
    JobBusy,
    JobError,
    UnknownJob,
)
from llmos.jobs.jobs import Job, JobState
from llmos.kernel import schema

pytestmark = pytest.mark.databases


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with closing(open_store(tmp_path / "kernel.db", schema.KERNEL)) as store:
        yield Home(tmp_path, store)


def test_a_submitted_job_waits_with_its_request(home: Home) -> None:
    job_id = home.submit({"steps": 3, "model": "m"})
    job = home.jobs.job(job_id)
    assert (job.id, job.kind, job.principal) == (job_id, "train", "erin")
    assert job.request == {"steps": 3, "model": "m"}
    assert (job.state, job.cancel_requested) == (JobState.QUEUED, False)
    assert (job.checkpoint, job.result, job.error) == (None, None, None)
    assert job.created_at == job.updated_at
    assert not home.jobs.is_live(job_id)


def test_a_job_is_submitted_in_the_callers_transaction(home: Home) -> None:
    def submit_and_fail() -> None:
        with home.store.transaction() as conn:
            home.jobs.submit(conn, "train", "erin", {})
            raise ValueError("something else went wrong")

    with pytest.raises(ValueError, match="something else"):
        submit_and_fail()
    assert home.jobs.jobs() == ()


def test_jobs_are_listed_newest_first(home: Home) -> None:
    ids = [home.submit() for _ in range(3)]
    assert {job.id for job in home.jobs.jobs()} == set(ids)
    made = [job.created_at for job in home.jobs.jobs()]
    assert made == sorted(made, reverse=True)


def test_an_unknown_job_is_refused_and_leaves_no_lock_file(home: Home) -> None:
    for act in (
        home.jobs.job,
        home.request_cancel,
        home.retry,
        lambda name: home.jobs.run(name, {}),
    ):
        with pytest.raises(UnknownJob, match=r"no job '[./]+x'") as refused:
            act("../../x")
        assert refused.value.hint == "`llmos jobs ls` lists them"
    assert not (home.folder / "run").exists()


def test_a_checkpoint_is_pointed_to_and_dropped(home: Home) -> None:
    job_id = home.submit()
    for object_id in ("ab12", None):
        home.point_to(home.jobs.job(job_id), object_id)
        assert home.jobs.job(job_id).checkpoint == object_id


def test_a_cancel_request_stays_until_the_job_sees_it(home: Home) -> None:
    job_id = home.submit()
    assert not home.jobs.job(job_id).cancel_requested
    home.request_cancel(job_id)
    assert home.jobs.job(job_id).cancel_requested


@pytest.mark.parametrize("state", [JobState.DONE, JobState.CANCELLED])
def test_a_job_that_has_ended_is_neither_cancelled_nor_run(home: Home, state: JobState) -> None:
    job_id = home.submit()
    home.finish(home.jobs.job(job_id), state)
    with pytest.raises(JobError, match=f"is {state} already"):
        home.request_cancel(job_id)
    with pytest.raises(JobError, match=f"is {state} already"):
        home.jobs.run(job_id, {"one": unexpected})


def test_a_killed_job_goes_on_with_the_step_that_was_cut_off(home: Home) -> None:
    job_id = home.submit()
    with home.process(job_id, "wait") as first:
        assert home.jobs.is_live(job_id)
        with pytest.raises(JobBusy):
            home.jobs.run(job_id, {"one": unexpected})
        first.send_signal(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
    home.wait_until_free(job_id)
    assert home.jobs.job(job_id).state is JobState.RUNNING, "to be shown as interrupted"
    with home.process(job_id) as second:
        assert second.communicate() == ("", ""), "it prints nothing of its own"
        assert second.returncode == 0
    assert home.trace() == [f"{job_id} one", *[f"{job_id} two after ['one']"] * 2]
    job = home.jobs.job(job_id)
    assert (job.state, job.result) == (JobState.DONE, {"count": 2})


def test_two_jobs_run_at_the_same_time_on_one_home(home: Home) -> None:
    ids = [home.submit(), home.submit()]
    with home.process(ids[0], "wait") as one, home.process(ids[1], "wait") as two:
        assert all(home.jobs.is_live(job_id) for job_id in ids)
        for process in (one, two):
            assert process.communicate() == ("", "")
            assert process.returncode == 0
    assert [job.state for job in home.jobs.jobs()] == [JobState.DONE, JobState.DONE]
    assert sorted(home.trace()) == sorted(
        line for job_id in ids for line in (f"{job_id} one", f"{job_id} two after ['one']")
    )


def test_a_killed_job_is_not_run_by_the_process_of_another_one(home: Home) -> None:
    killed, other = home.submit(), home.submit()
    with home.process(killed, "wait"):
        pass  # the block's end kills it
    with home.process(other) as process:
        process.communicate()
    assert [line.split()[0] for line in home.trace()] == [killed, killed, other, other]
    assert home.jobs.job(killed).state is JobState.RUNNING


def test_an_error_of_ours_is_kept_with_its_text(home: Home) -> None:
    job_id = home.submit()
    error = DataError("the file is gone")
    with pytest.raises(DataError) as raised:
        home.jobs.run(job_id, {"one": returning({"n": 1}), "two": raising(error)})
    assert raised.value is error
    job = home.jobs.job(job_id)
    assert (job.state, job.error) == (JobState.FAILED, "DataError: the file is gone")
    assert not home.jobs.is_live(job_id)


def test_a_foreign_errors_text_is_kept_nowhere(home: Home) -> None:
    job_id = home.submit()
    with home.process(job_id, "fail") as process:
        _, stderr = process.communicate()
        assert process.returncode == 1
    assert stderr.rstrip().endswith("RuntimeError: Maria Lopez has asthma"), "the caller has it"
    assert home.jobs.job(job_id).error == "RuntimeError"
    assert home.jobs.job(job_id).state is JobState.FAILED
    for file in home.folder.glob("*.db*"):
        assert b"Lopez" not in file.read_bytes()


def test_jobs_of_two_threads_run_at_the_same_time(home: Home) -> None:
    ids = [home.submit(), home.submit()]
    both = threading.Barrier(2, timeout=60)

    def work(job: Job, _results: Results) -> dict[str, Any]:
        both.wait()
        home.finish(job)
        return {}

    threads = [threading.Thread(target=home.jobs.run, args=(i, {"one": work})) for i in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {home.jobs.job(job_id).state for job_id in ids} == {JobState.DONE}


@pytest.mark.sqlite("its lock file")
def test_the_files_of_jobs_are_for_their_owner_only(home: Home) -> None:
    before = os.umask(0)
    try:
        job_id = home.submit()
        home.jobs.run(job_id, {"end": home.end})
    finally:
        os.umask(before)
    assert (home.folder / f"run/{job_id}.lock").stat().st_mode & 0o777 == 0o600


def test_a_failed_job_is_put_back_into_the_queue_with_its_completed_steps(home: Home) -> None:
    job_id = home.submit()
    home.fail(job_id, DataError("failed"))
    home.retry(job_id)
    job = home.jobs.job(job_id)
    assert (job.state, job.error) == (JobState.QUEUED, None)
    assert home.jobs.run(job_id, {"one": unexpected, "two": home.end}).state is JobState.DONE


def test_only_a_failed_job_is_put_back_into_the_queue(home: Home) -> None:
    def refused(job_id: str) -> None:
        before = home.jobs.job(job_id)
        with pytest.raises(JobError, match=f"is {before.state}; only a failed job") as error:
            home.retry(job_id)
        assert error.value.hint == f"`llmos jobs show {job_id}` says more about it"
        assert home.jobs.job(job_id) == before

    def running(job: Job, _results: Results) -> dict[str, Any]:
        refused(job.id)
        home.finish(job)
        return {}

    job_id = home.submit()
    refused(job_id)
    home.jobs.run(job_id, {"one": running})
    refused(job_id)
    cancelled = home.submit()
    home.finish(home.jobs.job(cancelled), JobState.CANCELLED)
    refused(cancelled)
