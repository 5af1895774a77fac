"""The one door: nothing is read, trained or changed without a decision, a payment and a record.

The record of an act is written in the transaction of the act, so neither exists without the other.
A refusal or failure leaves no act behind; its record has a transaction of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Protocol

from sqlalchemy import Connection, select

from llmos.errors import LedgerConflict, LlmosError, PermissionDenied, StorageError
from llmos.kernel.budget import Budget, ReservationState
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action, Decision, Policy, Resource
from llmos.kernel.pools import Part
from llmos.kernel.schema import approvals, standing_digest
from llmos.kernel.store import Store, now
from llmos.privacy import Mechanism, mechanism_to_dict

_ENTRY_VERSION: Final = 1
_EMPTY: Final[Mapping[str, Any]] = {}


class Outcome(StrEnum):
    """How an act ended, as its record says."""

    DONE = "done"
    DENIED = "denied"  # policy forbids it
    REFUSED = "refused"  # the ledger cannot pay or account for it
    FAILED = "failed"  # it was begun and undone; a hold stays
    ADMITTED = "admitted"  # a grant was given
    PROGRESSED = "progressed"
    SETTLED = "settled"
    ABORTED = "aborted"


class Log(Protocol):
    """Where records go; `kernel.auditlog.AuditLog` is one."""

    def append(self, conn: Connection, entry: Mapping[str, Any]) -> int:
        """Add an entry in the caller's transaction and return its index."""


@dataclass(frozen=True, slots=True)
class Charge:
    """What an admission costs whom: the mechanism, and the data and unit it is accounted for."""

    dataset: str
    part: Part
    fingerprint: str
    unit_column: str
    mechanism: Mechanism


@dataclass(frozen=True, slots=True)
class _Recorder:
    """Writes the records of one act."""

    log: Log
    who: Principal
    action: Action
    resource: Resource
    decision: Decision

    def write(self, conn: Connection, outcome: Outcome, details: Mapping[str, Any]) -> None:
        facts = {**details, "policies": list(self.decision.policies)}
        if self.who.key_id is not None:
            facts["api_key"] = self.who.key_id
        entry = {
            "v": _ENTRY_VERSION,
            "at": now(),
            "actor": self.who.name,
            "action": str(self.action),
            "resource": str(self.resource),
            "outcome": str(outcome),
            "details": facts,
            "state": standing_digest(conn),
        }
        self.log.append(conn, entry)


class Grant:
    """The right to open certain objects and to run what was reserved; dead after its block."""

    def __init__(
        self,
        budget: Budget,
        store: Store,
        recorder: _Recorder,
        *,
        key: str,
        objects: Iterable[str],
        charge: Charge | None,
    ) -> None:
        """Made by `Monitor.admit` only."""
        self._budget = budget
        self._store = store
        self._recorder = recorder
        self._key = key
        self._objects = set(objects)
        self._charge = charge
        self._alive = True

    def permits(self, object_id: str) -> bool:
        """Tell whether the holder may open this object now."""
        return self._alive and object_id in self._objects

    def extend(self, object_id: str) -> None:
        """Permit an object that was made under this grant.

        Raises:
            LedgerConflict: the grant has ended.
        """
        self._require_alive()
        self._objects.add(object_id)

    def progress(self, steps: int) -> None:
        """Record durably that `steps` steps were run; call it before anything of them is kept.

        Raises:
            LedgerConflict: the grant has ended, charges nothing, or has fewer steps than that.
        """
        self._require_charge()
        with self._store.transaction() as conn:
            self._budget.progress(conn, self._key, steps)
            self._recorder.write(conn, Outcome.PROGRESSED, {"job": self._key, "steps": steps})

    def settle(
        self,
        mechanism: Mechanism,
        *,
        conn: Connection | None = None,
        details: Mapping[str, Any] = _EMPTY,
    ) -> None:
        """Spend what was run and give back the rest of the hold.

        With `conn`, an open transaction of the kernel's store, it becomes part of that one.

        Raises:
            LedgerConflict: the grant has ended, charges nothing, or this cannot have been run.
        """
        self._require_charge()
        with self._transaction(conn) as inside:
            costs = self._budget.commit(inside, self._key, mechanism).costs
            facts = {
                "job": self._key,
                "mechanism": mechanism_to_dict(mechanism),
                "costs": _texts(costs),
            }
            self._recorder.write(inside, Outcome.SETTLED, {**details, **facts})

    def abort(self, *, conn: Connection | None = None) -> None:
        """Give the whole hold back, only while no step was run.

        Raises:
            LedgerConflict: the grant has ended, charges nothing, or steps were run.
        """
        self._require_charge()
        with self._transaction(conn) as inside:
            self._budget.abort(inside, self._key)
            self._recorder.write(inside, Outcome.ABORTED, {"job": self._key})

    def close(self) -> None:
        """End the grant; nothing can be opened or changed with it any more."""
        self._alive = False

    def _transaction(self, conn: Connection | None) -> AbstractContextManager[Connection]:
        return self._store.transaction() if conn is None else nullcontext(conn)

    def _require_alive(self) -> None:
        if not self._alive:
            raise LedgerConflict(
                f"the grant for {self._key} has ended", hint="ask the monitor for a new one"
            )

    def _require_charge(self) -> None:
        self._require_alive()
        if self._charge is None:
            raise LedgerConflict(f"{self._key} was admitted without a charge; it has no steps")


@dataclass(frozen=True, slots=True)
class Monitor:
    """Asks the policy, charges the ledger and writes the log, always all three."""

    store: Store
    policy: Policy = field(repr=False)
    budget: Budget = field(repr=False)
    log: Log = field(repr=False)

    def authorize(
        self,
        who: Principal,
        action: Action,
        resource: Resource,
        *,
        context: Mapping[str, Any] = _EMPTY,
    ) -> None:
        """Return if policy allows an act that changes nothing and opens no object.

        Raises:
            PermissionDenied: policy does not allow it; the denial is recorded.
        """
        self._decide(who, action, resource, context)

    @contextmanager
    def act(
        self,
        who: Principal,
        action: Action,
        resource: Resource,
        *,
        details: Mapping[str, Any] = _EMPTY,
        context: Mapping[str, Any] = _EMPTY,
    ) -> Iterator[Connection]:
        """Yield the transaction of an allowed act and record it there when the block ends.

        `details` holds numbers, names and hashes, never content; it is read when the block ends, so
        that the block can fill it.

        Raises:
            PermissionDenied: policy does not allow it; the denial is recorded.
        """
        recorder = self._decide(who, action, resource, context)
        with (
            self._recording_failure(recorder, Outcome.FAILED, details),
            self.store.transaction() as conn,
        ):
            yield conn
            recorder.write(conn, Outcome.DONE, details)

    @contextmanager
    def fulfil(
        self,
        who: Principal,
        approval: str,
        action: Action,
        resource: Resource,
        details: Mapping[str, Any],
    ) -> Iterator[Connection]:
        """Yield the transaction of what is left to do of an approved act, and record it at its end.

        Policy is not asked again: `who` is the one who decided, and the decision is in the log.

        Raises:
            PermissionDenied: it was not approved.
        """
        decided = Decision(allowed=True, policies=(approval,), reason="approved")
        recorder = _Recorder(self.log, who, action, resource, decided)
        with self.store.transaction() as conn:
            approved = select(approvals.c.id).filter_by(id=approval, state="approved")
            if conn.execute(approved).first() is None:
                reason = f"{approval} was not approved"
                raise PermissionDenied(who.name, action, str(resource), reason=reason)
            yield conn
            recorder.write(conn, Outcome.DONE, details)

    @contextmanager
    def admit(
        self,
        who: Principal,
        action: Action,
        resource: Resource,
        *,
        key: str,
        objects: Iterable[str],
        charge: Charge | None,
        context: Mapping[str, Any] = _EMPTY,
        details: Mapping[str, Any] = _EMPTY,
    ) -> Iterator[Grant]:
        """Authorise, reserve and record in one transaction, then yield the grant for the block.

        An exception in the block is recorded and leaves the hold: what was run may have been seen.
        Admitting the same key and charge again goes on with the same hold. A reservation that was
        settled or aborted opens no objects, it can only be settled or aborted the same way again.

        Raises:
            PermissionDenied: policy does not allow it; the denial is recorded.
            BudgetExceeded, UnaccountableMechanism, LedgerConflict: the ledger refuses; recorded.
        """
        objects = frozenset(objects)
        recorder = self._decide(who, action, resource, context)
        facts = {**details, "job": key}
        with self._recording_failure(recorder, Outcome.REFUSED, facts):
            if charge is not None:
                self.budget.precompute(charge.dataset, charge.part, charge.mechanism)
            with self.store.transaction() as conn:
                if charge is not None:
                    facts |= self._reserve(conn, key, charge, objects)
                recorder.write(conn, Outcome.ADMITTED, facts)
        grant = Grant(self.budget, self.store, recorder, key=key, objects=objects, charge=charge)
        try:
            with self._recording_failure(recorder, Outcome.FAILED, facts):
                yield grant
        finally:
            grant.close()

    def _reserve(
        self, conn: Connection, key: str, charge: Charge, objects: frozenset[str]
    ) -> dict[str, Any]:
        """Reserve a charge and return what the record says about it."""
        reservation = self.budget.reserve(
            conn,
            key,
            charge.dataset,
            charge.fingerprint,
            charge.unit_column,
            charge.mechanism,
            part=charge.part,
        )
        if reservation.state is not ReservationState.HELD and objects:
            raise LedgerConflict(
                f"the budget of {key} is {reservation.state} already; it opens no data again",
                hint="plan a new job",
            )
        return {
            "dataset": charge.dataset,
            "mechanism": mechanism_to_dict(charge.mechanism),
            "costs": _texts(reservation.costs),
        }

    def _decide(
        self, who: Principal, action: Action, resource: Resource, context: Mapping[str, Any]
    ) -> _Recorder:
        decision = self.policy.decide(who, action, resource, context)
        recorder = _Recorder(self.log, who, action, resource, decision)
        if not decision.allowed:
            with self.store.transaction() as conn:
                recorder.write(conn, Outcome.DENIED, {"reason": decision.reason})
            raise PermissionDenied(who.name, action, str(resource), reason=decision.reason)
        return recorder

    @contextmanager
    def _recording_failure(
        self, recorder: _Recorder, outcome: Outcome, details: Mapping[str, Any]
    ) -> Iterator[None]:
        """Record an exception that leaves the block, by its class only: texts may quote data."""
        try:
            yield
        except BaseException as error:
            refused = outcome is Outcome.REFUSED and isinstance(error, LlmosError)
            final = Outcome.REFUSED if refused else Outcome.FAILED
            try:
                with self.store.transaction() as conn:
                    recorder.write(conn, final, {**details, "error": type(error).__name__})
            except StorageError as unrecorded:
                error.add_note(f"this failure could not be recorded: {unrecorded}")
            raise


def _texts(costs: Mapping[str, int]) -> dict[str, str]:
    """Write integers as text: JSON numbers end at 2**53."""
    return {pool: str(cost) for pool, cost in costs.items()}
