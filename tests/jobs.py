"""One home's jobs, steps for them, and processes that run them and are really killed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from sqlalchemy import select
from tests.databases import STRICT

from llmos.databases.postgresql import PostgreSQL
from llmos.jobs.jobs import Job, Jobs, JobState, Step
from llmos.jobs.tables import job_steps
from llmos.kernel.store import Store

# Ends the connections that hold leases: only they keep a lock while they do nothing.
_END_SESSION: Final = (
    "SELECT count(pg_terminate_backend(pid)) FROM pg_locks JOIN pg_stat_activity USING (pid) "
    "WHERE locktype = 'advisory' AND state = 'idle'"
)
Results = Mapping[str, dict[str, Any]]

# Runs job argv[2] of home argv[1]. Each step writes a line to `trace`, step two also to standard
# output; then it does what argv[3] says.
WORKER = """
import resource, signal, sys, threading
from pathlib import Path
from llmos.errors import JobInterrupted
from llmos.databases.postgresql import PostgreSQL
from llmos.kernel import schema
from tests.databases import open_store
from llmos.jobs.jobs import Jobs, JobState
from llmos.workflows.ctrl_c import stopped_by_ctrl_c

home, job_id, behaviour = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
store = open_store(home / "kernel.db", schema.KERNEL)
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
with stopped_by_ctrl_c(interrupt):
    jobs.run(job_id, {"one": one, "two": two})
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
        database = self.store.database
        if isinstance(database, PostgreSQL):
            database.run(_END_SESSION)
            self.wait_until_free(job.id)
        else:
            (self.folder / "run" / f"{job.id}.lock").unlink()
        return self.jobs.run(job.id, steps)

    def wait_until_free(self, job_id: str) -> None:
        """Wait for a server to notice that a lease's connection is gone; a file lock is at once."""
        deadline = time.monotonic() + 10
        while self.jobs.is_live(job_id):
            assert time.monotonic() < deadline

    @contextmanager
    def process(self, job_id: str, behaviour: str = "end") -> Iterator[subprocess.Popen[str]]:
        """Start a process that runs a job and yield when it is in step two."""
        with subprocess.Popen(
            [sys.executable, *STRICT, "-c", WORKER, str(self.folder), job_id, behaviour],
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
            rows = conn.execute(select(job_steps))
            return {(row.job, row.name): f"{row.at} {row.result}" for row in rows}

    def trace(self) -> list[str]:
        return (self.folder / "trace").read_text().splitlines()


def returning(result: dict[str, Any]) -> Step:
    return lambda _job, _results: result


def raising(error: BaseException) -> Step:
    def fail(_job: Job, _results: Results) -> dict[str, Any]:
        raise error

    return fail


def unexpected(_job: Job, _results: Results) -> dict[str, Any]:
    pytest.fail("this step was run")
