"""Pools and reservations as values, and how they are read from their tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final, NamedTuple

import rfc8785
from sqlalchemy import Connection, Row, select

from llmos.errors import LedgerConflict, UnknownDataset
from llmos.kernel.schema import (
    budget_costs,
    budget_events,
    budget_pools,
    budget_reservations,
    datasets,
)
from llmos.privacy import (
    Mechanism,
    Neighboring,
    PrivacyLoss,
    PrivacyUnit,
    mechanism_from_dict,
    mechanism_to_dict,
)


class Part(NamedTuple):
    """Who uses a part of a dataset's budget: jobs for a purpose, of a tenant, or both."""

    purpose: str | None = None
    tenant: str | None = None


WHOLE: Final = Part()


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
    purpose: str
    tenant: str | None
    mechanism: Mechanism  # as reserved; after commit as run
    costs: Mapping[str, int]  # by pool, in 1e-12 nats at its order
    steps_done: int
    state: ReservationState

    @property
    def cost(self) -> int:
        """What it takes from the dataset's own pool, in 1e-12 nats."""
        return self.costs[self.dataset]

    def to_dict(self) -> dict[str, Any]:
        """Return the reservation as JSON values."""
        return {**asdict(self), "cost": self.cost, "mechanism": mechanism_to_dict(self.mechanism)}


@dataclass(frozen=True, slots=True)
class Balance:
    """A pool's amounts in 1e-12 nats."""

    cap: int
    spent: int
    held: int


@dataclass(frozen=True, slots=True)
class PoolState:
    """One budget; cap, spent and held are Renyi divergence in 1e-12 nats.

    A dataset has one pool that every job on it is charged to, and may have more for purposes,
    tenants and both: parts that only their jobs are charged to as well.
    """

    id: str
    dataset: str
    purpose: str | None
    tenant: str | None
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
    def balance(self) -> Balance:
        """The three amounts, which the pool's events must add up to."""
        return Balance(self.cap, self.spent, self.held)

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


def pool_id(dataset: str, part: Part) -> str:
    """Return the id of a dataset's own pool, whose part is that of all, or of a part."""
    purpose = "" if part.purpose is None else f"/{part.purpose}"
    return f"{dataset}{purpose}" if part.tenant is None else f"{dataset}{purpose}@{part.tenant}"


def find_pool(conn: Connection, pool: str) -> PoolState | None:
    """Read a pool by its id, if there is one."""
    row = conn.execute(select(budget_pools).where(budget_pools.c.id == pool)).one_or_none()
    return None if row is None else as_pool(row)


def get_pool(conn: Connection, pool: str) -> PoolState:
    """Read a pool by its id.

    Raises:
        UnknownDataset: there is none.
    """
    if (found := find_pool(conn, pool)) is None:
        raise UnknownDataset(
            f"{pool} has no privacy budget", hint="`llmos budget ls` lists the budgets"
        )
    return found


def charged_pools(conn: Connection, dataset: str, part: Part) -> tuple[PoolState, ...]:
    """Return every pool that a job on a dataset is charged to, its own first.

    These are the pools of the dataset and of all that it was made from: what one person changes in
    an ancestor changes at most that person's records here. Where one of these was split in blocks,
    those pay too; a job on one block pays for that block alone, because nobody is in two of them
    (parallel composition: McSherry 2009, doi:10.1145/1559845.1559850, theorem 4; in a filter, the
    individual losses of Feldman and Zrnic 2020, arXiv:2008.11193). They are always taken in this
    order.

    Raises:
        UnknownDataset: the dataset or an ancestor has no budget.
    """
    found: dict[str, PoolState] = {}
    waiting = [dataset]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = get_pool(conn, name)
            parents = select(datasets.c.parents).where(datasets.c.name == name)
            waiting += json.loads(conn.execute(parents).scalar_one())
            blocks = select(datasets.c.name).where(datasets.c.block_of == name)
            waiting += conn.execute(blocks).scalars()
    for name in tuple(found):
        for paying in (Part(part.purpose), Part(None, part.tenant), part):
            if (pool := find_pool(conn, pool_id(name, paying))) is not None:
                found[pool.id] = pool
    return (found.pop(dataset), *(found[key] for key in sorted(found)))


def as_pool(row: Row[*tuple[Any, ...]]) -> PoolState:
    """Read a row of `budget_pools`."""
    total = PrivacyLoss(
        float.fromhex(row.epsilon),
        float.fromhex(row.delta),
        PrivacyUnit(row.unit_column),
        Neighboring(row.neighboring),
    )
    return PoolState(
        id=row.id,
        dataset=row.dataset,
        purpose=row.purpose,
        tenant=row.tenant,
        total=total,
        fingerprint=row.fingerprint,
        renyi_order=float.fromhex(row.renyi_order),
        cap=row.cap,
        spent=row.spent,
        held=row.held,
    )


def as_reservation(conn: Connection, row: Row[*tuple[Any, ...]]) -> Reservation:
    """Read a row of `budget_reservations` with its costs."""
    costs = select(budget_costs.c.pool, budget_costs.c.cost).where(
        budget_costs.c.reservation == row.id
    )
    return Reservation(
        id=row.id,
        dataset=row.dataset,
        purpose=row.purpose,
        tenant=row.tenant,
        mechanism=mechanism_from_dict(json.loads(row.mechanism)),
        costs={pool: cost for pool, cost in conn.execute(costs.order_by(budget_costs.c.pool))},
        steps_done=row.steps_done,
        state=ReservationState(row.state),
    )


def find_reservation(conn: Connection, key: str) -> Reservation | None:
    """Read a reservation, if something was reserved under this key."""
    query = select(budget_reservations).where(budget_reservations.c.id == key)
    row = conn.execute(query).one_or_none()
    return None if row is None else as_reservation(conn, row)


def get_reservation(conn: Connection, key: str) -> Reservation:
    """Read a reservation.

    Raises:
        LedgerConflict: nothing was reserved under this key.
    """
    if (found := find_reservation(conn, key)) is None:
        raise LedgerConflict(f"nothing was reserved under {key}")
    return found


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
    reserved = (budget_events.c.reference == key) & (budget_events.c.kind == "reserve")
    text = conn.execute(select(budget_events.c.mechanism).where(reserved).limit(1)).scalar_one()
    return mechanism_from_dict(json.loads(text))


def holding_keys(conn: Connection, pool: str) -> tuple[str, ...]:
    """Return who holds parts of a pool."""
    query = (
        select(budget_reservations.c.id)
        .join(budget_costs, budget_costs.c.reservation == budget_reservations.c.id)
        .where(budget_costs.c.pool == pool, budget_reservations.c.state == "held")
    )
    return tuple(conn.execute(query).scalars())


def mechanism_text(mechanism: Mechanism) -> str:
    """Write a mechanism as canonical JSON (RFC 8785); equal mechanisms have equal texts."""
    return rfc8785.dumps(mechanism_to_dict(mechanism)).decode()
