"""Durable jobs: rows, and the results of their steps, in kernel.db; one live process by lease.

A step is at least once: its result is stored when it has returned, and a process that goes on with
the job gets the stored results and begins with the first step that has none. Whether the process
before it was killed, was stopped by Ctrl-C or failed makes no difference.

Each run takes the job's next attempt number, and every write of the run names it. So a run that
another one has overtaken, although both believed to have the lease, changes nothing any more.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import rfc8785
from sqlalchemy import Connection, Row, insert, select, update

from llmos.errors import (
    JobError,
    JobInterrupted,
    JobOvertaken,
    LlmosError,
    StorageError,
    UnknownJob,
)
from llmos.jobs import lease, tables
from llmos.kernel.store import Store, now

JsonObject = dict[str, Any]
Step = Callable[["Job", Mapping[str, JsonObject]], JsonObject]


class JobState(StrEnum):
    """Where a job stands; `running` without a live process means that it was interrupted."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Job:
    """One piece of work and all that a worker needs for it."""

    id: str
    kind: str
    principal: str
    request: JsonObject
    state: JobState
    cancel_requested: bool
    checkpoint: str | None  # vault object id
    result: JsonObject | None
    error: str | None
    created_at: str
    updated_at: str
    attempt: int  # the run that made this value; its writes are refused once a later one began


def _job(row: Row[Any]) -> Job:
    parsed = {
        "request": json.loads(row.request),
        "state": JobState(row.state),
        "cancel_requested": bool(row.cancel_requested),
        "result": json.loads(row.result) if row.result else None,
    }
    return Job(**row._asdict() | parsed)


class Jobs:
    """The job table of one home and the engine that runs its steps."""

    def __init__(self, store: Store, home: Path) -> None:
        """Keep jobs in `store`, and leases in its server, or in `home/run` where it has none."""
        self._store = store
        self._leases = lease.place(store, home)

    def submit(self, conn: Connection, kind: str, principal: str, request: JsonObject) -> str:
        """Store a job in the caller's transaction and return its id."""
        job_id = f"{kind}-{secrets.token_hex(4)}"
        at = now()
        conn.execute(
            insert(tables.jobs).values(
                id=job_id,
                kind=kind,
                principal=principal,
                request=rfc8785.dumps(request).decode(),
                state=JobState.QUEUED,
                cancel_requested=0,
                created_at=at,
                updated_at=at,
            )
        )
        return job_id

    def job(self, job_id: str) -> Job:
        """Return one job.

        Raises:
            UnknownJob: no job has this id.
        """
        with self._store.read() as conn:
            return _read(conn, job_id)

    def jobs(self) -> tuple[Job, ...]:
        """Return all jobs, newest first."""
        order = (tables.jobs.c.created_at.desc(), tables.jobs.c.id)
        with self._store.read() as conn:
            return tuple(_job(row) for row in conn.execute(select(tables.jobs).order_by(*order)))

    def request_cancel(self, conn: Connection, job_id: str) -> None:
        """Ask a job to stop at its next step boundary.

        Raises:
            UnknownJob: no job has this id.
            JobError: the job has ended already.
        """
        _change(conn, _unfinished(conn, job_id), cancel_requested=1)

    def retry(self, conn: Connection, job_id: str) -> None:
        """Put a failed job back into the queue; the steps that it completed stay completed.

        Raises:
            UnknownJob: no job has this id.
            JobError: the job has not failed.
        """
        job = _read(conn, job_id)
        if job.state is not JobState.FAILED:
            raise JobError(
                f"job {job_id} is {job.state}; only a failed job is tried again",
                hint=f"`llmos jobs show {job_id}` says more about it",
            )
        _change(conn, job, state=JobState.QUEUED, error=None)

    def set_checkpoint(self, conn: Connection, job: Job, object_id: str | None) -> None:
        """Point the job to its newest complete checkpoint.

        Raises:
            JobOvertaken: another run of the job has begun since `job` was read.
        """
        _change(conn, job, checkpoint=object_id)

    def finish(self, conn: Connection, job: Job, state: JobState, result: JsonObject) -> None:
        """Record how a job ended, in the transaction of its last effect.

        Raises:
            JobOvertaken: another run of the job has begun since `job` was read.
        """
        _change(conn, job, state=state, result=rfc8785.dumps(result).decode(), error=None)

    def is_live(self, job_id: str) -> bool:
        """Tell whether a process holds this job's lease right now."""
        return lease.is_held(self._leases, job_id)

    def run(self, job_id: str, steps: Mapping[str, Step]) -> Job:
        """Run a job's steps in order to the end and return the job as it then stands.

        A step that completed in an earlier run is not run again; one that was cut off or failed is
        run again from its start, so each step must be idempotent under the job's id. What a step
        changes of the job it changes through the `Job` that it was given.

        Raises:
            UnknownJob: no job has this id.
            JobError: the job has ended already.
            JobBusy: another live process runs it.
            JobOvertaken: another run began although this one had the lease.
        """
        self.job(job_id)  # before there is a lock file of this name
        with lease.hold(self._leases, job_id):
            job, results = self._begin(job_id)
            try:
                for name, step in steps.items():
                    if name not in results:
                        results[name] = json.loads(self._keep(job, name, step(job, results)))
            except JobInterrupted:
                raise
            except Exception as error:
                with suppress(StorageError, JobOvertaken), self._store.transaction() as conn:
                    if _read(conn, job_id).state is JobState.RUNNING:  # its step may have ended it
                        _change(conn, job, state=JobState.FAILED, error=public_text(error))
                raise
        return self.job(job_id)

    def _begin(self, job_id: str) -> tuple[Job, dict[str, JsonObject]]:
        """Take the next attempt number; return the job with it and the results stored so far."""
        steps = tables.job_steps
        with self._store.transaction() as conn:
            job = _unfinished(conn, job_id)
            _change(conn, job, state=JobState.RUNNING, error=None, attempt=job.attempt + 1)
            rows = conn.execute(select(steps).where(steps.c.job == job_id))
            return _read(conn, job_id), {row.name: json.loads(row.result) for row in rows}

    def _keep(self, job: Job, name: str, result: JsonObject) -> str:
        """Store what a step returned, and return the text that every later run will read."""
        text = rfc8785.dumps(result).decode()
        row = {"job": job.id, "name": name, "result": text, "at": now()}
        with self._store.transaction() as conn:
            _change(conn, job)  # refuses an overtaken run
            conn.execute(insert(tables.job_steps).values(row))
        return text


def public_text(error: Exception) -> str:
    """Say what went wrong in our own words only: another's text could quote the data."""
    name = type(error).__name__
    return f"{name}: {error}" if isinstance(error, LlmosError) else name


def _read(conn: Connection, job_id: str) -> Job:
    row = conn.execute(select(tables.jobs).where(tables.jobs.c.id == job_id)).first()
    if row is None:
        raise UnknownJob(f"no job {job_id!r}", hint="`llmos jobs ls` lists them")
    return _job(row)


def _unfinished(conn: Connection, job_id: str) -> Job:
    job = _read(conn, job_id)
    if job.state in (JobState.DONE, JobState.CANCELLED):
        raise JobError(f"job {job_id} is {job.state} already")
    return job


def _change(conn: Connection, job: Job, **values: object) -> None:
    """Change a job's row, if no run has begun since `job` was read."""
    same = (tables.jobs.c.id == job.id) & (tables.jobs.c.attempt == job.attempt)
    changed = conn.execute(update(tables.jobs).where(same).values(**values, updated_at=now()))
    if changed.rowcount == 0:
        raise JobOvertaken(
            f"another run of job {job.id} has begun; this one has changed nothing more",
            hint=f"follow it with `llmos jobs show {job.id}`",
        )
