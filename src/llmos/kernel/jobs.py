"""Durable jobs: rows in kernel.db, steps made durable by DBOS, one live process a job by lease.

A step is at least once: its result is stored when it has returned, and a process that goes on with
the job gets the stored results and begins with the first step that has none. Whether the process
before it was killed, was stopped by Ctrl-C or failed makes no difference.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Any, Final

import rfc8785
from sqlalchemy import Connection, Row, insert, select, update
from sqlalchemy.exc import DBAPIError

from llmos.errors import (
    IntegrityError,
    JobError,
    JobInterrupted,
    LlmosError,
    StorageError,
    UnknownJob,
)
from llmos.kernel import lease, schema
from llmos.kernel.store import Store, now

JsonObject = dict[str, Any]
Step = Callable[["Job", Mapping[str, JsonObject]], JsonObject]

_SAFE_SERIALIZER: Final = "portable_json"
_HINT: Final = "move it away: unfinished jobs then go on from their newest checkpoint"
_BUSY_TIMEOUT_S: Final = 30.0  # as DBOS has it
_one_at_a_time: Final = threading.Lock()  # DBOS is one per process


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


def _job(row: Row[Any]) -> Job:
    return Job(
        id=row.id,
        kind=row.kind,
        principal=row.principal,
        request=json.loads(row.request),
        state=JobState(row.state),
        cancel_requested=bool(row.cancel_requested),
        checkpoint=row.checkpoint,
        result=json.loads(row.result) if row.result else None,
        error=row.error,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )


class Jobs:
    """The job table of one home and the engine that runs its steps."""

    def __init__(self, store: Store, home: Path) -> None:
        """Use `home/jobs.db` for DBOS and `home/run` for leases."""
        self._store = store
        self._home = home

    def submit(self, conn: Connection, kind: str, principal: str, request: JsonObject) -> str:
        """Store a job in the caller's transaction and return its id."""
        job_id = f"{kind}-{secrets.token_hex(4)}"
        at = now()
        conn.execute(
            insert(schema.jobs).values(
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
            row = conn.execute(select(schema.jobs).where(schema.jobs.c.id == job_id)).first()
        if row is None:
            raise UnknownJob(f"no job {job_id!r}", hint="`llmos jobs ls` lists them")
        return _job(row)

    def jobs(self) -> tuple[Job, ...]:
        """Return all jobs, newest first."""
        order = (schema.jobs.c.created_at.desc(), schema.jobs.c.id)
        with self._store.read() as conn:
            return tuple(_job(row) for row in conn.execute(select(schema.jobs).order_by(*order)))

    def request_cancel(self, conn: Connection, job_id: str) -> Job:
        """Ask a job to stop at its next step boundary and return it as it was.

        Raises:
            UnknownJob: no job has this id.
            JobError: the job has ended already.
        """
        job = self._unfinished(job_id)
        self._change(conn, job_id, cancel_requested=1)
        return job

    def set_checkpoint(self, conn: Connection, job_id: str, object_id: str | None) -> None:
        """Point the job to its newest complete checkpoint."""
        self._change(conn, job_id, checkpoint=object_id)

    def finish(self, conn: Connection, job_id: str, state: JobState, result: JsonObject) -> None:
        """Record how a job ended, in the transaction of its last effect."""
        self._change(conn, job_id, state=state, result=rfc8785.dumps(result).decode(), error=None)

    def is_live(self, job_id: str) -> bool:
        """Tell whether a process holds this job's lease right now."""
        return lease.is_held(self._home / "run", job_id)

    def run(
        self, job_id: str, steps: Mapping[str, Step], interrupt: threading.Event | None = None
    ) -> Job:
        """Run a job's steps in order to the end and return the job as it then stands.

        A step that completed in an earlier process is not run again; one that was cut off or
        failed is run again from its start, so each step must be idempotent under the job's id.
        The first Ctrl-C sets `interrupt`, which the steps poll; the second one breaks the step off.

        Raises:
            UnknownJob: no job has this id.
            JobError: the job has ended already.
            JobBusy: another live process runs it.
            IntegrityError: the DBOS database is damaged, or holds what could run code.
            StorageError: the DBOS database cannot be written.
        """
        self._unfinished(job_id)  # before there is a lock file of this name
        stop = interrupt or threading.Event()
        with lease.hold(self._home / "run", job_id), _interrupts(stop):
            job = self._unfinished(job_id)
            with self._store.transaction() as conn:
                self._change(conn, job_id, state=JobState.RUNNING, error=None)
            try:
                _run_durably(self._home / "jobs.db", job, steps)
            except JobInterrupted:
                raise
            except Exception as error:
                with suppress(StorageError), self._store.transaction() as conn:
                    self._fail(conn, job_id, error)
                raise
        return self.job(job_id)

    def _unfinished(self, job_id: str) -> Job:
        job = self.job(job_id)
        if job.state in (JobState.DONE, JobState.CANCELLED):
            raise JobError(f"job {job_id} is {job.state} already")
        return job

    def _fail(self, conn: Connection, job_id: str, error: Exception) -> None:
        """Keep why a job failed; only our own texts, since others' could quote the data."""
        name = type(error).__name__
        text = f"{name}: {error}" if isinstance(error, LlmosError) else name
        state = select(schema.jobs.c.state).where(schema.jobs.c.id == job_id)
        if conn.execute(state).scalar_one() == JobState.RUNNING:  # its step may have ended it
            self._change(conn, job_id, state=JobState.FAILED, error=text)

    def _change(self, conn: Connection, job_id: str, **values: object) -> None:
        conn.execute(
            update(schema.jobs).where(schema.jobs.c.id == job_id).values(**values, updated_at=now())
        )


@contextmanager
def _interrupts(interrupt: threading.Event) -> Iterator[None]:
    """Let the first Ctrl-C of the block set `interrupt` instead of raising KeyboardInterrupt."""
    raising = signal.default_int_handler
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not raising:
        yield  # someone else decides what Ctrl-C does
        return

    def on_interrupt(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, raising)
        # not here: `set` takes a lock that the code under the handler may hold just now
        threading.Thread(target=interrupt.set).start()

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, raising)


class _StepFailed(BaseException):
    """Carries a step's error past DBOS, which would store the text of any `Exception`."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


def _run_durably(database: Path, job: Job, steps: Mapping[str, Step]) -> None:
    """Run the steps that have no stored result yet as one DBOS workflow in this thread."""
    from dbos import DBOS, DBOSPortableJSONSerializer, SetWorkflowID  # noqa: PLC0415 - 0.8 s

    def run_step(name: str, results: Mapping[str, JsonObject]) -> JsonObject:
        try:
            return steps[name](job, results)
        except Exception as error:
            raise _StepFailed(error) from error

    def run_job(results: dict[str, JsonObject]) -> None:
        for name in steps:
            if name not in results:
                results[name] = DBOS.run_step({"name": name}, run_step, name, results)

    _make_safe(database)
    with _one_at_a_time:
        try:
            workflow = DBOS.workflow(name="llmos.job")(run_job)
            DBOS(
                config={
                    "name": "llmos",
                    "system_database_url": f"sqlite:///{database}",
                    # DBOS itself recovers only what its executor left behind; this one never was,
                    # so that no background thread runs a step of this or of another job.
                    "executor_id": f"{job.id}.{secrets.token_hex(8)}",
                    "application_version": "1",
                    "run_admin_server": False,
                    "log_level": "CRITICAL",
                    "serializer": DBOSPortableJSONSerializer(),
                    "notification_listener_polling_interval_sec": 0.2,  # what `destroy` waits for
                }
            )
            DBOS.launch()
            attempt, results = _attempts(DBOS, job.id)
            with SetWorkflowID(f"{job.id}.{attempt}"):
                workflow(results)
        except _StepFailed as stopped:
            raise stopped.error  # noqa: B904 - its own cause says more
        except DBAPIError as error:
            raise StorageError(f"{database} cannot be used: {error.orig}") from error
        finally:
            DBOS.destroy(destroy_registry=True)


def _attempts(dbos: Any, job_id: str) -> tuple[int, dict[str, JsonObject]]:  # noqa: ANN401
    """Return how often a job was run so far, and the results of the steps that completed."""
    attempt, results = 0, {}
    while dbos.get_workflow_status(f"{job_id}.{attempt}") is not None:
        for step in dbos.list_workflow_steps(f"{job_id}.{attempt}"):
            results[step["function_name"]] = step["output"]
        attempt += 1
    return attempt, results


def _make_safe(database: Path) -> None:
    """Create the DBOS database for its owner only, or refuse one whose reading could run code.

    DBOS unpickles a value that is marked as pickled. A trigger or view, of which DBOS makes none,
    could produce one after this check.
    """
    try:
        os.close(os.open(database, os.O_RDWR | os.O_CREAT, 0o600))
        with closing(sqlite3.connect(database, timeout=_BUSY_TIMEOUT_S)) as conn:
            unsafe = _unsafe_values(conn)
    except OSError as error:
        raise StorageError.of(error, str(database)) from error
    except sqlite3.DatabaseError as error:
        raise StorageError(f"{database} cannot be read: {error}", hint=_HINT) from error
    if unsafe:
        raise IntegrityError(f"{database} holds what is not plain JSON: {unsafe}", hint=_HINT)


def _unsafe_values(conn: sqlite3.Connection) -> str:
    """Name the first trigger, view or table with a value that is not plain JSON, or nothing."""
    active = conn.execute("SELECT name FROM sqlite_master WHERE type IN ('trigger', 'view')")
    if found := active.fetchone():
        return str(found[0])
    tables = conn.execute(
        "SELECT m.name FROM sqlite_master m JOIN pragma_table_info(m.name) c "
        "WHERE c.name = 'serialization' AND m.type = 'table'"
    )
    for (table,) in tables.fetchall():
        quoted = table.replace('"', '""')
        where = "WHERE serialization IS NOT NULL AND serialization != ?"
        query = f'SELECT 1 FROM "{quoted}" {where}'  # noqa: S608 - quoted
        if conn.execute(query, (_SAFE_SERIALIZER,)).fetchone():
            return str(table)
    return ""
