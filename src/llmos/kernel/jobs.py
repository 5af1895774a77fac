"""Durable jobs: rows in kernel.db, steps made durable by DBOS, one live process a job by lease."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, cast

import rfc8785
from sqlalchemy import Connection, Row, insert, select, text, update

from llmos.errors import IntegrityError, JobBusy, JobError, UnknownJob
from llmos.kernel import schema
from llmos.kernel.store import Store, now

JsonObject = dict[str, Any]
Step = Callable[["Job", Mapping[str, JsonObject]], JsonObject]

_APPLICATION: Final = "llmos"
_LEASE_SUFFIX: Final = ".lock"
_SAFE_SERIALIZER: Final = "portable_json"


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
        """Ask a job to stop at its next step boundary; one that never ran is cancelled at once.

        Raises:
            UnknownJob: no job has this id.
            JobError: the job has ended already.
        """
        job = self.job(job_id)
        if job.state in (JobState.DONE, JobState.CANCELLED):
            raise JobError(f"job {job_id} is {job.state} already")
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
        try:
            with self._lease(job_id):
                return False
        except JobBusy:
            return True

    def run(
        self, job_id: str, steps: Mapping[str, Step], interrupt: threading.Event | None = None
    ) -> Job:
        """Run a job's steps in order to the end and return the job as it then stands.

        A step that completed in an earlier process is not run again; one that was cut off is run
        again from its start, so each step must be idempotent under the job's id. Ctrl-C sets
        `interrupt`, which the steps poll, and waits for the running step to end by itself.

        Raises:
            UnknownJob: no job has this id.
            JobError: the job has ended already.
            JobBusy: another live process runs it.
            IntegrityError: the DBOS database holds values in a format that could run code.
        """
        with self._lease(job_id):
            job = self.job(job_id)
            if job.state in (JobState.DONE, JobState.CANCELLED):
                raise JobError(f"job {job_id} is {job.state} already")
            with self._store.transaction() as conn:
                self._change(conn, job_id, state=JobState.RUNNING, error=None)
            try:
                _run_durably(self._home / "jobs.db", job, steps, interrupt or threading.Event())
            except BaseException as error:
                with self._store.transaction() as conn:
                    self._fail(conn, job_id, error)
                raise
        return self.job(job_id)

    def _fail(self, conn: Connection, job_id: str, error: BaseException) -> None:
        state = conn.execute(
            select(schema.jobs.c.state).where(schema.jobs.c.id == job_id)
        ).scalar_one()
        if state == JobState.RUNNING:
            self._change(
                conn, job_id, state=JobState.FAILED, error=f"{type(error).__name__}: {error}"
            )

    def _change(self, conn: Connection, job_id: str, **values: object) -> None:
        conn.execute(
            update(schema.jobs).where(schema.jobs.c.id == job_id).values(**values, updated_at=now())
        )

    @contextmanager
    def _lease(self, job_id: str) -> Iterator[None]:
        """Hold the job's lock file; the kernel of the machine releases it when the process dies."""
        folder = self._home / "run"
        folder.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(folder / (job_id + _LEASE_SUFFIX), os.O_CREAT | os.O_RDWR, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise JobBusy(
                    f"job {job_id} is being run by another process",
                    hint=f"follow it with `llmos jobs show {job_id}`",
                ) from None
            yield
        finally:
            os.close(descriptor)


@dataclass(slots=True)
class _Running:
    """What DBOS calls back into; DBOS functions are global, so one job runs per process."""

    job: Job
    steps: Mapping[str, Step]
    error: BaseException | None = None


_slot = threading.Lock()
_running: list[_Running] = []


def _run_durably(
    database: Path, job: Job, steps: Mapping[str, Step], interrupt: threading.Event
) -> None:
    """Run the steps as one DBOS workflow; a failed attempt is followed by a fresh one."""
    from dbos import DBOS, DBOSPortableJSONSerializer, SetWorkflowID  # noqa: PLC0415 - 0.8 s

    _refuse_unsafe_values(database)
    with _slot:
        running = _Running(job, steps)
        _running.append(running)
        DBOS(
            config={
                "name": _APPLICATION,
                "system_database_url": f"sqlite:///{database}",
                # Recovery looks for workflows of this executor only: never another job's.
                "executor_id": job.id,
                "application_version": "1",
                "run_admin_server": False,
                "log_level": "CRITICAL",
                "serializer": DBOSPortableJSONSerializer(),
                "notification_listener_polling_interval_sec": 0.2,
            }
        )
        try:
            workflow = _registered_workflow()
            DBOS.launch()
            database.chmod(0o600)
            attempt = 0
            while (status := DBOS.get_workflow_status(f"{job.id}.{attempt}")) is not None and (
                status.status not in ("PENDING", "ENQUEUED")
            ):
                attempt += 1
            with SetWorkflowID(f"{job.id}.{attempt}"):
                handle = DBOS.start_workflow(workflow, list(steps))
            try:
                handle.get_result(polling_interval_sec=0.1)
            except KeyboardInterrupt:
                interrupt.set()
                handle.get_result(polling_interval_sec=0.1)
            if running.error is not None:
                raise running.error
        finally:
            DBOS.destroy()
            _running.clear()


_workflow: list[Callable[[list[str]], Any]] = []


def _registered_workflow() -> Callable[[list[str]], Any]:
    """Register the one workflow function once per process and return it."""
    from dbos import DBOS  # noqa: PLC0415 - 0.8 s

    if not _workflow:

        @DBOS.workflow(name="llmos.job", max_recovery_attempts=1000)  # type: ignore[untyped-decorator]
        def run_job(names: list[str]) -> JsonObject:
            results: dict[str, JsonObject] = {}
            for name in names:
                results[name] = DBOS.run_step({"name": name}, _run_step, name, results)
                if results[name].get("failed"):
                    break
            return results

        _workflow.append(cast("Callable[[list[str]], Any]", run_job))
    return _workflow[0]


def _run_step(name: str, results: Mapping[str, JsonObject]) -> JsonObject:
    """Run one step; its exception stays in memory, since stored exceptions would be pickled."""
    running = _running[0]
    try:
        return running.steps[name](running.job, results)
    except BaseException as error:  # noqa: BLE001 - handed to the caller of `run`, not swallowed
        running.error = error
        return {"failed": type(error).__name__}


def _refuse_unsafe_values(database: Path) -> None:
    """Refuse a DBOS database with pickled values: reading one would run whatever it holds."""
    if not database.exists():
        return
    from sqlalchemy import create_engine  # noqa: PLC0415 - a database that is not the kernel's

    engine = create_engine(f"sqlite:///{database}")
    try:
        with engine.connect() as conn:
            tables = conn.execute(
                text(
                    "SELECT m.name FROM sqlite_master m JOIN pragma_table_info(m.name) c "
                    "WHERE m.type = 'table' AND c.name = 'serialization'"
                )
            ).scalars()
            for table in list(tables):
                unsafe = conn.execute(
                    text(
                        f'SELECT count(*) FROM "{table}" '  # noqa: S608 - a name from the schema
                        "WHERE serialization IS NOT NULL AND serialization != :safe"
                    ),
                    {"safe": _SAFE_SERIALIZER},
                ).scalar_one()
                if unsafe:
                    raise IntegrityError(
                        f"{database.name}: {unsafe} values in {table} are not plain JSON",
                        hint="the job database was changed from outside; restore it from a backup",
                    )
    finally:
        engine.dispose()
