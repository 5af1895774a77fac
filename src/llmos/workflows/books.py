"""Books: whether the ledger, the queue of jobs and the signed log tell the same story.

Rows that grow with every job are in no digest of the log. What they hold is told more than once: by
reservations, costs and events, by the pools, and by the entries of the acts that wrote them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import rfc8785
from sqlalchemy import Connection, Row, select

from llmos.errors import IntegrityError
from llmos.jobs.jobs import Job, Jobs
from llmos.kernel import pricing
from llmos.kernel.auditlog import AuditLog, LogEntry
from llmos.kernel.budget import Budget, Reservation, ReservationState
from llmos.kernel.kernel import Kernel
from llmos.kernel.pools import Part, PoolState, as_reservation, charged_pools, mechanism_text
from llmos.kernel.schema import budget_events, budget_reservations
from llmos.kernel.store import Store
from llmos.privacy import mechanism_to_dict

_PAGE_OF_LOG: Final = 1000
_ENDS: Final = {"settled": ReservationState.COMMITTED, "aborted": ReservationState.ABORTED}
_EVENTS: Final = {
    ReservationState.HELD: ["reserve"],
    ReservationState.COMMITTED: ["reserve", "commit"],
    ReservationState.ABORTED: ["reserve", "abort"],
}


@dataclass(slots=True)
class _Recorded:
    """What the log says about one job."""

    facts: dict[str, Any] = field(default_factory=dict)  # of all its entries; the newest count
    reserved: Any = None  # the mechanism as it was first recorded
    state: ReservationState = ReservationState.HELD
    steps: int = 0


def check(kernel: Kernel, jobs: Jobs) -> None:
    """Compare the databases' structure, the ledger's rows and the jobs' requests with the log.

    Raises:
        IntegrityError: something differs; the message says what.
        StorageError: a database cannot be read.
    """
    for store in (kernel.store, kernel.vault.keyring.store):
        _check_structure(store)
    recorded = _recorded(kernel.auditlog)
    with kernel.store.read() as conn:
        rows = conn.execute(select(budget_reservations)).all()
        reservations = [as_reservation(conn, row) for row in rows]
        for row, reservation in zip(rows, reservations, strict=True):
            said = recorded.get(row.id, _Recorded())
            _require(row.mechanism == mechanism_text(reservation.mechanism), row.id, "mechanism")
            _check_against_log(reservation, said)
            _check_amounts(conn, reservation, said)
    held = {reservation.id for reservation in reservations}
    for key, said in recorded.items():
        _require(key in held or "costs" not in said.facts, key, "reservation")
    for pool in kernel.budget.pools():
        _check_pool(kernel.budget, pool, reservations)
    _check_caps(kernel, held)
    queue = {job.id: job for job in jobs.jobs()}
    for job in queue.values():
        _check_job(job, recorded.get(job.id, _Recorded()))
    for key, said in recorded.items():
        _require(key in queue or "request_sha256" not in said.facts, key, "job")


def _check_structure(store: Store) -> None:
    """Let SQLite compare its pages and indices: a broken index hides rows that are there."""
    with store.read() as conn:
        if conn.dialect.name == "sqlite":
            found = conn.exec_driver_sql("PRAGMA integrity_check(1)").scalar_one()
            _require(found == "ok", str(store.database), "structure")


def _recorded(log: AuditLog) -> dict[str, _Recorded]:
    found: dict[str, _Recorded] = {}
    for entry in _entries(log):
        details = entry.fields.get("details", {})
        if "job" not in details or entry.fields["outcome"] in {"failed", "refused", "denied"}:
            continue
        said = found.setdefault(details["job"], _Recorded())
        if said.reserved is None:
            said.reserved = details.get("mechanism")
        if "request_sha256" in details:
            said.facts["submitted_by"] = entry.fields["actor"]
        said.facts |= details
        if entry.fields["outcome"] == "progressed":
            said.steps = max(said.steps, details["steps"])
        said.state = _ENDS.get(entry.fields["outcome"], said.state)
    return found


def _entries(log: AuditLog) -> Iterator[LogEntry]:
    page = log.entries(limit=_PAGE_OF_LOG)
    while page:
        yield from page
        page = log.entries(page[-1].index, _PAGE_OF_LOG)


def _check_against_log(reservation: Reservation, said: _Recorded) -> None:
    key, facts, mechanism = reservation.id, said.facts, mechanism_to_dict(reservation.mechanism)
    costs = {pool: str(cost) for pool, cost in reservation.costs.items()}
    steps = {
        ReservationState.HELD: said.steps,
        ReservationState.COMMITTED: reservation.mechanism.steps,
        ReservationState.ABORTED: 0,
    }[reservation.state]
    _require(reservation.state is said.state, key, "state")
    _require(reservation.steps_done == steps, key, "steps")
    _require(facts.get("purpose") == reservation.purpose, key, "purpose")
    _require(facts.get("tenant") == reservation.tenant, key, "tenant")
    _require(facts.get("dataset", reservation.dataset) == reservation.dataset, key, "dataset")
    _require(facts.get("mechanism", mechanism) == mechanism, key, "mechanism")
    if reservation.state is not ReservationState.ABORTED:
        _require(facts.get("costs", costs) == costs, key, "costs")


def _check_amounts(conn: Connection, reservation: Reservation, said: _Recorded) -> None:
    """Price the mechanism again, and hold each pool's events against the reservation."""
    key, aborted = reservation.id, reservation.state is ReservationState.ABORTED
    paying = Part(reservation.purpose, reservation.tenant)
    pools = {pool.id: pool for pool in charged_pools(conn, reservation.dataset, paying)}
    _require(pools.keys() == reservation.costs.keys(), key, "pools")
    query = select(budget_events).where(budget_events.c.reference == key)
    rows = conn.execute(query.order_by(budget_events.c.seq)).all()
    _require({row.pool for row in rows} == pools.keys(), key, "events")
    for name, cost in reservation.costs.items():
        order = pools[name].renyi_order
        _require(
            cost == (0 if aborted else pricing.cost(reservation.mechanism, order)), key, "cost"
        )
        _check_events([row for row in rows if row.pool == name], reservation, cost, said)


def _check_events(
    events: Sequence[Row[Any]], reservation: Reservation, cost: int, said: _Recorded
) -> None:
    key, state = reservation.id, reservation.state
    _require([event.kind for event in events] == _EVENTS[state], key, "events")
    first, last = events[0], events[-1]
    if said.reserved is not None:
        _require(first.mechanism == rfc8785.dumps(said.reserved).decode(), key, "first event")
    _require(last.mechanism == mechanism_text(reservation.mechanism), key, "last event")
    held = cost if state is ReservationState.HELD else -last.held_change
    _require((first.held_change, first.spent_change) == (held, 0), key, "first event")
    if state is not ReservationState.HELD:
        _require(last.spent_change == cost, key, "last event")
    _require(not any(event.cap_change for event in events), key, "events")


def _check_pool(budget: Budget, pool: PoolState, reservations: Sequence[Reservation]) -> None:
    _require(budget.recompute(pool.id) == pool.balance, pool.id, "balance")
    for state, amount in (
        (ReservationState.COMMITTED, pool.spent),
        (ReservationState.HELD, pool.held),
    ):
        costs = [r.costs.get(pool.id, 0) for r in reservations if r.state is state]
        _require(sum(costs) == amount, pool.id, f"{state} amount")


def _check_caps(kernel: Kernel, reservations: set[str]) -> None:
    """Find for each event of no reservation that it made a pool, or that two people raised it."""
    raised = {asked.id: asked.subject for asked in kernel.approvals.approvals() if asked.record}
    with kernel.store.read() as conn:
        others = budget_events.c.reference.not_in(reservations)
        for event in conn.execute(select(budget_events).where(others)).all():
            made = (event.kind, event.reference) == ("create", "")
            by_two = event.kind == "raise" and raised.get(event.reference) == event.pool
            _require(made or by_two, event.pool, "cap")
            _require(not (event.held_change or event.spent_change), event.pool, "cap")


def _check_job(job: Job, said: _Recorded) -> None:
    digest = request_digest(job.request)
    _require(job.id.rpartition("-")[0] == job.kind, job.id, "kind")
    _require(said.facts.get("request_sha256", digest) == digest, job.id, "request")
    _require(said.facts.get("submitted_by", job.principal) == job.principal, job.id, "principal")


def request_digest(request: dict[str, Any]) -> str:
    """Return the SHA-256 of a job's request in canonical JSON, hex; its submission records it."""
    return hashlib.sha256(rfc8785.dumps(request)).hexdigest()


def _require(agrees: bool, subject: str, what: str) -> None:
    if not agrees:
        raise IntegrityError(
            f"the books were changed: {subject}'s {what} and the log or the ledger do not agree",
            hint="restore kernel.db from a backup; the log says what was done",
        )
