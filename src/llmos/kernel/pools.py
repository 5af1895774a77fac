"""Pools and reservations as values, and how they are read from their tables."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import rfc8785
from sqlalchemy import Connection, Row, Select, select

from llmos.errors import LedgerConflict, UnknownDataset
from llmos.kernel.schema import budget_events, budget_pools, budget_reservations
from llmos.privacy import (
    Mechanism,
    Neighboring,
    PrivacyLoss,
    PrivacyUnit,
    mechanism_from_dict,
    mechanism_to_dict,
)


class ReservationState(StrEnum):
    """Where a reservation stands; only a held one can change."""

    HELD = "held"
    COMMITTED = "committed"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class Reservation:
    """What one job holds or has spent; `id` is the job's id."""

    id: str
    dataset: str
    mechanism: Mechanism  # as reserved; after commit as run
    cost: int  # in 1e-12 nats at the pool's order
    steps_done: int
    state: ReservationState

    def to_dict(self) -> dict[str, Any]:
        """Return the reservation as JSON values."""
        return {**asdict(self), "mechanism": mechanism_to_dict(self.mechanism)}


@dataclass(frozen=True, slots=True)
class PoolState:
    """One dataset's budget; cap, spent and held are Renyi divergence in 1e-12 nats."""

    dataset: str
    total: PrivacyLoss
    fingerprint: str
    renyi_order: float
    cap: int
    spent: int
    held: int

    @property
    def epsilon(self) -> float:
        """The epsilon that all jobs together stay within."""
        return self.total.epsilon

    @property
    def delta(self) -> float:
        """The delta that belongs to it."""
        return self.total.delta

    @property
    def remaining(self) -> int:
        """What new jobs can still reserve, in 1e-12 nats."""
        return self.cap - self.spent - self.held

    @property
    def spent_share(self) -> float:
        """The spent part of the cap, from 0 to 1."""
        return self.spent / self.cap

    @property
    def held_share(self) -> float:
        """The part of the cap that unsettled jobs hold, from 0 to 1."""
        return self.held / self.cap

    @property
    def remaining_share(self) -> float:
        """The part of the cap that is free, from 0 to 1."""
        return self.remaining / self.cap


def pool_query(dataset: str) -> Select[*tuple[Any, ...]]:
    """Select the row of a dataset's pool."""
    return select(budget_pools).where(budget_pools.c.dataset == dataset)


def get_pool(conn: Connection, dataset: str) -> PoolState:
    """Read a dataset's pool.

    Raises:
        UnknownDataset: the dataset has no budget.
    """
    row = conn.execute(pool_query(dataset)).one_or_none()
    if row is None:
        raise UnknownDataset(
            f"{dataset} has no privacy budget", hint="`llmos budget ls` lists the budgets"
        )
    return as_pool(row)


def as_pool(row: Row[*tuple[Any, ...]]) -> PoolState:
    """Read a row of `budget_pools`."""
    total = PrivacyLoss(
        float.fromhex(row.epsilon),
        float.fromhex(row.delta),
        PrivacyUnit(row.unit_column),
        Neighboring(row.neighboring),
    )
    order = float.fromhex(row.renyi_order)
    return PoolState(row.dataset, total, row.fingerprint, order, row.cap, row.spent, row.held)


def reservation_query(key: str) -> Select[*tuple[Any, ...]]:
    """Select the row of a reservation."""
    return select(budget_reservations).where(budget_reservations.c.id == key)


def as_reservation(row: Row[*tuple[Any, ...]]) -> Reservation:
    """Read a row of `budget_reservations`."""
    mechanism = mechanism_from_dict(json.loads(row.mechanism))
    state = ReservationState(row.state)
    return Reservation(row.id, row.dataset, mechanism, row.cost, row.steps_done, state)


def get_reservation(conn: Connection, key: str) -> Reservation:
    """Read a reservation.

    Raises:
        LedgerConflict: nothing was reserved under this key.
    """
    row = conn.execute(reservation_query(key)).one_or_none()
    if row is None:
        raise LedgerConflict(f"nothing was reserved under {key}")
    return as_reservation(row)


def get_held(conn: Connection, key: str) -> Reservation:
    """Read a reservation that can still change.

    Raises:
        LedgerConflict: nothing is held under this key.
    """
    reservation = get_reservation(conn, key)
    if reservation.state is not ReservationState.HELD:
        raise LedgerConflict(f"the reservation {key} is {reservation.state} and cannot change")
    return reservation


def reserved_mechanism(conn: Connection, key: str) -> Mechanism:
    """Return the mechanism as it was reserved; after a commit the row holds what was run."""
    reserved = (budget_events.c.reservation == key) & (budget_events.c.kind == "reserve")
    text = conn.execute(select(budget_events.c.mechanism).where(reserved)).scalar_one()
    return mechanism_from_dict(json.loads(text))


def holding_keys(conn: Connection, dataset: str) -> tuple[str, ...]:
    """Return who holds parts of a pool."""
    held = (budget_reservations.c.dataset == dataset) & (budget_reservations.c.state == "held")
    return tuple(conn.execute(select(budget_reservations.c.id).where(held)).scalars())


def mechanism_text(mechanism: Mechanism) -> str:
    """Write a mechanism as canonical JSON (RFC 8785); equal mechanisms have equal texts."""
    return rfc8785.dumps(mechanism_to_dict(mechanism)).decode()
