"""The federated jobs that this home coordinates: proposed, run round by round, ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import rfc8785
from sqlalchemy import Connection, Row, insert, select, update

from llmos.errors import JobError, UnknownJob
from llmos.federations.manifest import Manifest, SignedManifest, stored
from llmos.federations.statement import is_current
from llmos.federations.tables import (
    federated_answers,
    federated_jobs,
    federated_rounds,
    federated_statements,
)
from llmos.kernel.store import Store, now


class FederatedState(StrEnum):
    """Where a job stands at its coordinator."""

    RUNNING = "running"  # from the proposal on: sites answer, rounds follow
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class FederatedJob:
    """One job of this coordinator."""

    id: str
    principal: str
    signed: SignedManifest
    validation: str | None
    state: FederatedState
    rounds_done: int
    checkpoint: str | None
    error: str | None
    status: dict[str, Any] | None  # the round under way, as its process has told last
    created_at: str
    updated_at: str

    @property
    def manifest(self) -> Manifest:
        """Return what the job runs."""
        return self.signed.manifest


def propose(
    conn: Connection, signed: SignedManifest, principal: str, validation: str | None
) -> None:
    """Store a new job; its sites see it at their next call."""
    at = now()
    conn.execute(
        insert(federated_jobs).values(
            id=signed.manifest.id,
            principal=principal,
            envelope=_text(signed.envelope),
            validation=validation,
            state=FederatedState.RUNNING,
            rounds_done=0,
            created_at=at,
            updated_at=at,
        )
    )


def keep_answer(conn: Connection, job: str, site: str, envelope: Mapping[str, Any]) -> None:
    """Keep what a site signed last about a job."""
    row = {"envelope": _text(envelope), "at": now()}
    this = (federated_answers.c.job == job) & (federated_answers.c.site == site)
    if not conn.execute(update(federated_answers).where(this).values(row)).rowcount:
        conn.execute(insert(federated_answers).values(job=job, site=site, **row))


def keep_round(
    conn: Connection, job: str, number: int, checkpoint: str, facts: Mapping[str, Any]
) -> None:
    """Keep a finished round with the checkpoint that the next one starts from.

    Raises:
        JobError: the job has ended, or this is not its next round.
    """
    _change(conn, job, number, checkpoint=checkpoint, rounds_done=number + 1)
    row = {"job": job, "round": number, "facts": _text(facts), "at": now()}
    conn.execute(insert(federated_rounds).values(row))


def keep_loss(conn: Connection, job: str, number: int, loss: float) -> None:
    """Keep what the global model was worth after a round."""
    this = (federated_rounds.c.job == job) & (federated_rounds.c.round == number)
    conn.execute(update(federated_rounds).where(this).values(loss=json.dumps(loss)))


def keep_statement(conn: Connection, job: str, site: str, part: Mapping[str, Any]) -> None:
    """Keep what a site stated after a job, with its signatures and proofs."""
    row = {"part": _text(part), "at": now()}
    this = (federated_statements.c.job == job) & (federated_statements.c.site == site)
    if not conn.execute(update(federated_statements).where(this).values(row)).rowcount:
        conn.execute(insert(federated_statements).values(job=job, site=site, **row))


def tell(conn: Connection, job: str, status: Mapping[str, Any]) -> None:
    """Let other processes see the round under way."""
    this = federated_jobs.c.id == job
    conn.execute(update(federated_jobs).where(this).values(status=_text(status), updated_at=now()))


def end(
    conn: Connection, job: FederatedJob, state: FederatedState, error: str | None = None
) -> None:
    """End a job; the weights of one that is done are kept for its sites to fetch.

    Raises:
        JobError: it has ended, or another round was finished since `job` was read.
    """
    kept = job.checkpoint if state is FederatedState.DONE else None
    _change(conn, job.id, job.rounds_done, state=state, error=error, status=None, checkpoint=kept)


def job(store: Store, job_id: str) -> FederatedJob:
    """Return one job.

    Raises:
        UnknownJob: there is none of this id.
    """
    with store.read() as conn:
        this = federated_jobs.c.id == job_id
        row = conn.execute(select(federated_jobs).where(this)).one_or_none()
    if row is None:
        raise UnknownJob(f"no federated job {job_id!r}", hint="`llmos federate ls` lists them")
    return _job(row)


def jobs(store: Store) -> list[FederatedJob]:
    """Return all jobs, newest first."""
    order = (federated_jobs.c.created_at.desc(), federated_jobs.c.id)
    with store.read() as conn:
        return [_job(row) for row in conn.execute(select(federated_jobs).order_by(*order))]


def answers(store: Store, job_id: str) -> dict[str, dict[str, Any]]:
    """Return the signed answers to a job by site."""
    this = federated_answers.c.job == job_id
    with store.read() as conn:
        rows = conn.execute(select(federated_answers).where(this)).all()
    return {row.site: json.loads(row.envelope) for row in rows}


def statements(store: Store, job_id: str) -> dict[str, dict[str, Any]]:
    """Return what sites have stated after a job, by site.

    What was stated in an older form is as if it were not there: the site is asked again.
    """
    this = federated_statements.c.job == job_id
    with store.read() as conn:
        rows = conn.execute(select(federated_statements).where(this)).all()
    parts = {row.site: json.loads(row.part) for row in rows}
    return {site: part for site, part in parts.items() if is_current(part)}


def rounds(store: Store, job_id: str) -> list[dict[str, Any]]:
    """Return the facts of the finished rounds in order."""
    this = federated_rounds.c.job == job_id
    with store.read() as conn:
        rows = conn.execute(select(federated_rounds).where(this).order_by(federated_rounds.c.round))
        return [
            {
                "round": row.round,
                "at": row.at,
                "loss": None if row.loss is None else json.loads(row.loss),
                **json.loads(row.facts),
            }
            for row in rows
        ]


def _change(conn: Connection, job_id: str, before: int, /, **values: object) -> None:
    same = (federated_jobs.c.id == job_id) & (federated_jobs.c.rounds_done == before)
    running = federated_jobs.c.state == FederatedState.RUNNING
    changed = update(federated_jobs).where(same & running).values(**values, updated_at=now())
    if not conn.execute(changed).rowcount:
        raise JobError(f"{job_id} has ended, or went on, meanwhile", hint="`llmos federate ls`")


def _job(row: Row[Any]) -> FederatedJob:
    fields = row._asdict()
    envelope = json.loads(fields.pop("envelope"))
    fields["state"] = FederatedState(row.state)
    fields["status"] = None if row.status is None else json.loads(row.status)
    return FederatedJob(**fields, signed=stored(envelope))


def _text(value: Mapping[str, Any]) -> str:
    return rfc8785.dumps(dict(value)).decode()
