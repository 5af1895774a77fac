"""Jobs run in real processes that are really killed; `WORKER` is what such a process does."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError as SqlIntegrityError

from llmos.errors import (
    DataError,
    JobBusy,
    JobError,
    JobInterrupted,
    JobOvertaken,
    StorageFull,
    UnknownJob,
)
from llmos.kernel import schema
from llmos.kernel.jobs import Job, Jobs, JobState, Step
from llmos.kernel.store import Store

Results = Mapping[str, dict[str, Any]]

# Runs job argv[2] of home argv[1]. Each step writes a line to `trace`, step two also to standard
# output; then it does what argv[3] says.
WORKER = """
import resource, signal, sys, threading
from pathlib import Path
from llmos.errors import JobInterrupted
from llmos.kernel import schema
from llmos.kernel.jobs import Jobs, JobState
from llmos.kernel.store import Store

home, job_id, behaviour = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
store = Store.open(home / "kernel.db", schema.KERNEL)
jobs = Jobs(store, home)
interrupt = threading.Event()

def trace(line):
    with (home / "trace").open("a") as file:
        file.write(line + "\\n")

def one(job, results):
    trace(f"{job.id} one")
    return {"from": "one", "count": 1}

def two(job, results):
    trace(f"{job.id} two after {sorted(results)}")
    print("two", flush=True)
    if behaviour == "wait":
        sys.stdin.read()
    elif behaviour == "poll":
        assert interrupt.wait(60)
        print("stopping", flush=True)
        sys.stdin.readline()
        raise JobInterrupted("stopped after step 2")
    elif behaviour == "fail":
        raise RuntimeError("Maria Lopez has asthma")
    elif behaviour == "no-room":
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        return {}
    with store.transaction() as conn:
        jobs.finish(conn, job, JobState.DONE, {"count": results["one"]["count"] + 1})
    return {}

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.default_int_handler)
jobs.run(job_id, {"one": one, "two": two}, interrupt)
"""


class Home:
    """One home's jobs, and processes that run them."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.folder = folder
        self.store = store
        self.jobs = Jobs(store, folder)

    def submit(self, request: dict[str, Any] | None = None) -> str:
        with self.store.transaction() as conn:
            return self.jobs.submit(conn, "train", "erin", request or {"steps": 3})

    def finish(self, job: Job, state: JobState = JobState.DONE) -> None:
        with self.store.transaction() as conn:
            self.jobs.finish(conn, job, state, {"steps": 3})

    def point_to(self, job: Job, object_id: str | None) -> None:
        with self.store.transaction() as conn:
            self.jobs.set_checkpoint(conn, job, object_id)

    def request_cancel(self, job_id: str) -> None:
        with self.store.transaction() as conn:
            self.jobs.request_cancel(conn, job_id)

    def retry(self, job_id: str) -> None:
        with self.store.transaction() as conn:
            self.jobs.retry(conn, job_id)

    def end(self, job: Job, _results: Results) -> dict[str, Any]:
        """End the job; this is a step."""
        self.finish(job)
        return {}

    def fail(self, job_id: str, error: Exception) -> None:
        """Let a job fail in step `two`, after step `one`."""
        with pytest.raises(type(error)):
            self.jobs.run(job_id, {"one": returning({"n": 1}), "two": raising(error)})

    def overtake(self, job: Job, steps: Mapping[str, Step]) -> Job:
        """Run a job that is being run, as if its lease had been lost."""
        (self.folder / "run" / f"{job.id}.lock").unlink()
        return self.jobs.run(job.id, steps)

    @contextmanager
    def process(self, job_id: str, behaviour: str = "end") -> Iterator[subprocess.Popen[str]]:
        """Start a process that runs a job and yield when it is in step two."""
        with subprocess.Popen(
            [sys.executable, "-W", "error", "-c", WORKER, str(self.folder), job_id, behaviour],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "two\n", process.communicate()
            try:
                yield process
            finally:
                process.kill()

    def stored(self) -> dict[tuple[str, str], str]:
        """Return the results of all steps, as they are stored."""
        with self.store.read() as conn:
            rows = conn.execute(select(schema.job_steps))
            return {(row.job, row.name): f"{row.at} {row.result}" for row in rows}

    def trace(self) -> list[str]:
        return (self.folder / "trace").read_text().splitlines()


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with closing(Store.open(tmp_path / "kernel.db", schema.KERNEL)) as store:
        yield Home(tmp_path, store)


def returning(result: dict[str, Any]) -> Step:
    return lambda _job, _results: result


def raising(error: BaseException) -> Step:
    def fail(_job: Job, _results: Results) -> dict[str, Any]:
        raise error

    return fail


def unexpected(_job: Job, _results: Results) -> dict[str, Any]:
    pytest.fail("this step was run")


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


def test_steps_run_in_order_and_get_the_results_before_them(home: Home) -> None:
    job_id = home.submit()
    seen: list[tuple[str, JobState, Results]] = []

    def step(name: str) -> Step:
        def run(job: Job, results: Results) -> dict[str, Any]:
            seen.append((name, home.jobs.job(job.id).state, dict(results)))
            return {"by": name}

        return run

    names = ("b", "a", "c")
    job = home.jobs.run(job_id, {**{name: step(name) for name in names}, "end": home.end})
    assert (job.state, job.result, job.error) == (JobState.DONE, {"steps": 3}, None)
    assert [name for name, _, _ in seen] == list(names)
    assert {state for _, state, _ in seen} == {JobState.RUNNING}
    assert [results for _, _, results in seen] == [
        {},
        {"b": {"by": "b"}},
        {"b": {"by": "b"}, "a": {"by": "a"}},
    ]
    assert not home.jobs.is_live(job_id)


def test_a_killed_job_goes_on_with_the_step_that_was_cut_off(home: Home) -> None:
    job_id = home.submit()
    with home.process(job_id, "wait") as first:
        assert home.jobs.is_live(job_id)
        with pytest.raises(JobBusy):
            home.jobs.run(job_id, {"one": unexpected})
        first.send_signal(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
    assert not home.jobs.is_live(job_id)
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


def test_a_failed_job_keeps_its_completed_steps_and_forgets_its_error(home: Home) -> None:
    job_id = home.submit()
    home.fail(job_id, StorageFull("full"))

    def two(job: Job, results: Results) -> dict[str, Any]:
        assert home.jobs.job(job.id).error is None
        assert results == {"one": {"n": 1}}
        home.finish(job)
        return {}

    assert home.jobs.run(job_id, {"one": unexpected, "two": two}).state is JobState.DONE


def test_a_step_that_ended_the_job_before_it_failed_has_ended_it(home: Home) -> None:
    job_id = home.submit()

    def cancel(job: Job, _results: Results) -> dict[str, Any]:
        home.finish(job, JobState.CANCELLED)
        raise DataError("stopped")

    with pytest.raises(DataError):
        home.jobs.run(job_id, {"one": cancel})
    job = home.jobs.job(job_id)
    assert (job.state, job.error) == (JobState.CANCELLED, None)


def test_a_result_that_is_no_json_fails_the_job(home: Home) -> None:
    job_id = home.submit()
    with pytest.raises(rfc8785.CanonicalizationError):
        home.jobs.run(job_id, {"one": returning({"model": object()})})
    assert home.jobs.job(job_id).error == "CanonicalizationError"
    assert home.stored() == {}


def test_the_first_ctrl_c_lets_the_step_end_by_itself(home: Home) -> None:
    job_id = home.submit()
    with home.process(job_id, "poll") as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == "stopping\n"
        assert home.jobs.is_live(job_id), "it waits for the step"
        _, stderr = process.communicate("\n")
    assert stderr.rstrip().endswith("JobInterrupted: stopped after step 2")
    job = home.jobs.job(job_id)
    assert (job.state, job.error) == (JobState.RUNNING, None), "it did not fail"


def test_the_second_ctrl_c_breaks_the_step_off(home: Home) -> None:
    job_id = home.submit()
    with home.process(job_id, "poll") as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == "stopping\n"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
        assert process.returncode == -signal.SIGINT
    assert stderr.rstrip().endswith("KeyboardInterrupt")
    assert home.jobs.job(job_id).state is JobState.RUNNING
    assert not home.jobs.is_live(job_id)
    with home.process(job_id) as process:
        process.communicate()
    assert home.jobs.job(job_id).state is JobState.DONE


class LockedEvent(threading.Event):
    """An event whose lock can be held from outside, as `wait` holds it for moments."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def set(self) -> None:
        assert self.lock.acquire(timeout=10), "whoever holds it was interrupted by this very call"
        super().set()
        self.lock.release()


def test_ctrl_c_may_come_at_any_moment_and_is_as_before_when_the_job_has_ended(home: Home) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupt = LockedEvent()

    def press(_job: Job, _results: Results) -> dict[str, Any]:
        with interrupt.lock:
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.wait(60)
        raise JobInterrupted("stopped")

    try:
        for _ in range(2):
            interrupt.clear()
            with pytest.raises(JobInterrupted):
                home.jobs.run(home.submit(), {"one": press}, interrupt)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_callers_own_ctrl_c_is_left_alone(home: Home) -> None:
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: pressed.append(number))
    try:

        def press(job: Job, _results: Results) -> dict[str, Any]:
            os.kill(os.getpid(), signal.SIGINT)
            home.finish(job)
            return {}

        home.jobs.run(home.submit(), {"one": press})
    finally:
        signal.signal(signal.SIGINT, before)
    assert pressed == [signal.SIGINT]


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


def test_the_files_of_jobs_are_for_their_owner_only(home: Home) -> None:
    before = os.umask(0)
    try:
        job_id = home.submit()
        home.jobs.run(job_id, {"end": home.end})
    finally:
        os.umask(before)
    assert (home.folder / f"run/{job_id}.lock").stat().st_mode & 0o777 == 0o600


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.lists(st.sampled_from(["return", "fail", "stop"]), min_size=3, max_size=3)))
def test_a_steps_result_is_stored_once_and_never_changes(home: Home, runs: list[list[str]]) -> None:
    job_id = home.submit()
    errors: dict[str, Exception] = {"fail": DataError("failed"), "stop": JobInterrupted("stopped")}
    returned: dict[str, str] = {}  # step -> where it returned for the first time

    def step(name: str, number: int, outcome: str) -> Step:
        def run(_job: Job, results: Results) -> dict[str, Any]:
            assert name not in returned
            assert dict(results) == {other: {"by": by} for other, by in returned.items()}
            if outcome != "return":
                raise errors[outcome]
            returned[name] = f"run {number}"
            return {"by": returned[name]}

        return run

    for number, outcomes in enumerate(runs, 1):
        before = home.stored()
        steps = {name: step(name, number, o) for name, o in zip("abc", outcomes, strict=True)}
        with suppress(DataError, JobInterrupted):
            home.jobs.run(job_id, steps)
        assert home.stored().items() >= before.items()
        assert {name for job, name in home.stored() if job == job_id} == set(returned)
        assert home.jobs.job(job_id).attempt == number


@pytest.mark.parametrize("change", ["UPDATE job_steps SET result = '{}'", "DELETE FROM job_steps"])
def test_the_database_itself_refuses_to_change_a_stored_result(home: Home, change: str) -> None:
    home.fail(home.submit(), DataError("failed"))
    before = home.stored()
    with pytest.raises(SqlIntegrityError, match="append-only"), home.store.transaction() as conn:
        conn.exec_driver_sql(change)
    assert home.stored() == before != {}


def test_an_overtaken_runs_result_is_refused_and_the_later_one_stands(home: Home) -> None:
    job_id = home.submit()
    stop = raising(JobInterrupted("stopped"))

    def overtaken(job: Job, _results: Results) -> dict[str, Any]:
        with pytest.raises(JobInterrupted):
            home.overtake(job, {"one": returning({"by": "second"}), "two": stop})
        return {"by": "first"}

    with pytest.raises(JobOvertaken, match=f"another run of job {job_id}") as refused:
        home.jobs.run(job_id, {"one": overtaken, "two": unexpected})
    assert refused.value.hint == f"follow it with `llmos jobs show {job_id}`"
    job = home.jobs.job(job_id)
    assert (job.state, job.error, job.attempt) == (JobState.RUNNING, None, 2)

    def two(job: Job, results: Results) -> dict[str, Any]:
        assert results == {"one": {"by": "second"}}
        return home.end(job, results)

    assert home.jobs.run(job_id, {"one": unexpected, "two": two}).state is JobState.DONE


def test_what_an_overtaken_run_does_to_its_job_is_refused(home: Home) -> None:
    begun: list[Job] = []

    def overtaken(job: Job, _results: Results) -> dict[str, Any]:
        stop = raising(JobInterrupted("stopped"))
        with pytest.raises(JobInterrupted):
            home.overtake(job, {"one": stop})
        after = home.jobs.job(job.id)
        with pytest.raises(JobOvertaken):
            home.point_to(job, "ab12")
        with pytest.raises(JobOvertaken):
            home.finish(job)
        assert home.jobs.job(job.id) == after
        begun.append(after)
        raise DataError("it failed, too")

    job_id = home.submit()
    with pytest.raises(DataError, match="it failed, too"):
        home.jobs.run(job_id, {"one": overtaken})
    assert [home.jobs.job(job_id)] == begun, "nor is the other run's job marked as failed"


def test_a_job_that_another_run_ended_is_not_ended_again(home: Home) -> None:
    job_id = home.submit()

    def overtaken(job: Job, _results: Results) -> dict[str, Any]:
        assert home.overtake(job, {"one": home.end}).state is JobState.DONE
        home.finish(job, JobState.CANCELLED)
        return {}

    with pytest.raises(JobOvertaken):
        home.jobs.run(job_id, {"one": overtaken})
    assert home.jobs.job(job_id).state is JobState.DONE


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


def test_a_result_that_cannot_be_stored_is_a_typed_error_and_costs_one_step(home: Home) -> None:
    job_id = home.submit()
    with home.process(job_id, "no-room") as process:
        _, stderr = process.communicate()
        assert process.returncode == 1
    assert re.search(r"Storage(Error|Full): .*kernel\.db", stderr.splitlines()[-1])
    assert home.jobs.job(job_id).state is JobState.RUNNING, "there was no room to say otherwise"
    with home.process(job_id) as process:
        process.communicate()
    assert home.jobs.job(job_id).state is JobState.DONE
    assert home.trace() == [f"{job_id} one", *[f"{job_id} two after ['one']"] * 2]
