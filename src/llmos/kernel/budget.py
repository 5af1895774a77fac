"""The ledger: what each dataset may still pay for in privacy, and who holds or spent how much.

One pool per dataset has a cap on the Renyi divergence at one order that is fixed when the pool is
made. A job's whole mechanism is reserved before it starts and settled for the steps it ran; a crash
leaves the hold. Jobs may be chosen after earlier results were seen and may run at the same time:
the admission rule is a privacy filter (Feldman and Zrnic 2020, arXiv:2008.11193; concurrent use:
Haney et al. 2023, arXiv:2309.05901). Amounts are integers of 1e-12 nats, costs rounded up and caps
down, so sums are exact and the database itself refuses an overspent pool. Events are the truth;
balances are a cache that must equal them.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from llmos.errors import (
    InvalidPrivacyParameter,
    LedgerConflict,
    UnaccountableMechanism,
)
from llmos.kernel import accounting, pricing
from llmos.kernel.pools import (
    PoolState,
    Reservation,
    ReservationState,
    as_pool,
    as_reservation,
    get_held,
    get_pool,
    get_reservation,
    holding_keys,
    mechanism_text,
    pool_query,
    reservation_query,
    reserved_mechanism,
)
from llmos.kernel.schema import budget_events, budget_pools, budget_reservations
from llmos.kernel.store import Store, now
from llmos.privacy import Mechanism, Neighboring, PrivacyLoss

__all__ = ["Budget", "PoolState", "Reservation", "ReservationState"]


class Budget:
    """The pools, reservations and events of one home."""

    def __init__(self, store: Store) -> None:
        """Work on the kernel's store."""
        self._store = store

    def create_pool(
        self, conn: Connection, dataset: str, fingerprint: str, total: PrivacyLoss
    ) -> PoolState:
        """Give a dataset its budget, once.

        Raises:
            InvalidPrivacyParameter: epsilon is out of range, or with this delta too small or too
                large for the filter.
            UnaccountableMechanism: the adjacency is not add-or-remove-one.
            LedgerConflict: the dataset has a budget already.
        """
        if total.neighboring is not Neighboring.ADD_OR_REMOVE_ONE:
            raise UnaccountableMechanism(f"no filter is known here for {total.neighboring}")
        order = accounting.fixed_order(total.epsilon, total.delta)
        cap = accounting.renyi_cap(total.epsilon, total.delta, order)
        units = math.floor(Fraction(cap) * pricing.UNITS_PER_NAT)
        if not 0 < units < pricing.TOO_MUCH:
            raise InvalidPrivacyParameter(
                "epsilon",
                total.epsilon,
                f"{'larger' if units <= 0 else 'smaller'} at delta {total.delta:g}: at Renyi order "
                f"{order:g}, which is fixed for the pool, it leaves {cap:.3g} nats to spend",
            )
        if conn.execute(pool_query(dataset)).first() is not None:
            raise LedgerConflict(f"{dataset} has a privacy budget already; it is set only once")
        conn.execute(
            insert(budget_pools).values(
                dataset=dataset,
                epsilon=total.epsilon.hex(),
                delta=total.delta.hex(),
                neighboring=str(total.neighboring),
                unit_column=total.unit.column,
                fingerprint=fingerprint,
                renyi_order=order.hex(),
                cap=units,
                spent=0,
                held=0,
            )
        )
        return get_pool(conn, dataset)

    def reserve(
        self,
        conn: Connection,
        key: str,
        dataset: str,
        fingerprint: str,
        unit_column: str,
        mechanism: Mechanism,
    ) -> Reservation:
        """Hold the whole cost of a mechanism, or return what was reserved under this key before.

        A reservation that was settled or aborted is returned as it stands and holds nothing.

        Raises:
            BudgetExceeded: the pool cannot pay; says what would still fit.
            UnaccountableMechanism: the data, unit or adjacency is not that of the pool.
            LedgerConflict: the key belongs to another mechanism or dataset.
            UnknownDataset: the dataset has no budget.
        """
        pool = get_pool(conn, dataset)
        _check_subject(pool, fingerprint, unit_column)
        if (row := conn.execute(reservation_query(key)).first()) is not None:
            if (row.dataset, reserved_mechanism(conn, key)) != (dataset, mechanism):
                raise LedgerConflict(f"{key} has reserved another mechanism or dataset before")
            return as_reservation(row)
        cost = pricing.cost(mechanism, pool.renyi_order)
        if cost > pool.remaining:
            raise pricing.refusal(pool, mechanism, holding_keys(conn, dataset))
        conn.execute(
            insert(budget_reservations).values(
                id=key,
                dataset=dataset,
                mechanism=mechanism_text(mechanism),
                cost=cost,
                steps_done=0,
                state="held",
            )
        )
        _move(conn, key, dataset, "reserve", mechanism, held=cost, spent=0)
        return get_reservation(conn, key)

    def progress(self, conn: Connection, key: str, steps: int) -> None:
        """Record that `steps` steps were run, before anything of them is released.

        Fewer steps than recorded before change nothing: a resumed job may repeat some.

        Raises:
            LedgerConflict: the reservation is not held, or has fewer steps than that.
        """
        reservation = get_held(conn, key)
        if not 0 <= steps <= reservation.mechanism.steps:
            raise LedgerConflict(
                f"{key} reserved {reservation.mechanism.steps} steps and cannot have run {steps}"
            )
        conn.execute(
            update(budget_reservations)
            .where(budget_reservations.c.id == key)
            .values(steps_done=max(steps, reservation.steps_done))
        )

    def commit(self, conn: Connection, key: str, mechanism: Mechanism) -> Reservation:
        """Turn a hold into spending for what was run; committing the same again changes nothing.

        Raises:
            LedgerConflict: it is another mechanism than the reserved one stopped early, has fewer
                steps than were recorded as run, or the reservation is not held.
        """
        reservation = get_reservation(conn, key)
        if reservation.state is ReservationState.COMMITTED and reservation.mechanism == mechanism:
            return reservation
        reservation = get_held(conn, key)
        reserved, done = reservation.mechanism, reservation.steps_done
        if mechanism != reserved.after(mechanism.steps):
            raise LedgerConflict(f"{key} reserved {reserved} and cannot have run {mechanism}")
        if not done <= mechanism.steps <= reserved.steps:
            raise LedgerConflict(
                f"{key} must settle for {done} to {reserved.steps} steps, not for {mechanism.steps}"
            )
        cost = pricing.cost(mechanism, get_pool(conn, reservation.dataset).renyi_order)
        return _close(conn, reservation, ReservationState.COMMITTED, mechanism, cost)

    def abort(self, conn: Connection, key: str) -> Reservation:
        """Give a hold back, only while no step was run; aborting again changes nothing.

        Raises:
            LedgerConflict: steps were run, which must be committed, or it was committed.
        """
        reservation = get_reservation(conn, key)
        if reservation.state is ReservationState.ABORTED:
            return reservation
        reservation = get_held(conn, key)
        if reservation.steps_done:
            raise LedgerConflict(
                f"{key} has run {reservation.steps_done} steps; they cannot be given back",
                hint="settle it for the steps it ran",
            )
        return _close(conn, reservation, ReservationState.ABORTED, reservation.mechanism, 0)

    def pool(self, dataset: str) -> PoolState:
        """Return the pool of a dataset.

        Raises:
            UnknownDataset: the dataset has no budget.
        """
        with self._store.read() as conn:
            return get_pool(conn, dataset)

    def pools(self) -> tuple[PoolState, ...]:
        """Return all pools, by dataset."""
        with self._store.read() as conn:
            rows = conn.execute(select(budget_pools).order_by(budget_pools.c.dataset))
            return tuple(as_pool(row) for row in rows)

    def reservation(self, key: str) -> Reservation:
        """Return a reservation by its key.

        Raises:
            LedgerConflict: nothing was reserved under it.
        """
        with self._store.read() as conn:
            return get_reservation(conn, key)

    def reservations(self, dataset: str) -> tuple[Reservation, ...]:
        """Return the reservations of a dataset, oldest first."""
        query = (
            select(budget_reservations)
            .join(budget_events, budget_events.c.reservation == budget_reservations.c.id)
            .where(budget_reservations.c.dataset == dataset, budget_events.c.kind == "reserve")
            .order_by(budget_events.c.seq)
        )
        with self._store.read() as conn:
            return tuple(as_reservation(row) for row in conn.execute(query))

    def recompute(self, dataset: str) -> tuple[int, int]:
        """Return (spent, held) from the events alone; a pool's balance must equal it."""
        totals = select(
            func.coalesce(func.sum(budget_events.c.spent_change), 0),
            func.coalesce(func.sum(budget_events.c.held_change), 0),
        ).where(budget_events.c.dataset == dataset)
        with self._store.read() as conn:
            spent, held = conn.execute(totals).one()
        return int(spent), int(held)

    def cost(self, dataset: str, mechanism: Mechanism) -> int:
        """Return what a mechanism would cost this dataset's pool, in 1e-12 nats.

        Raises:
            UnknownDataset: the dataset has no budget.
        """
        return pricing.cost(mechanism, self.pool(dataset).renyi_order)

    def precompute(self, dataset: str, mechanism: Mechanism) -> None:
        """Do the slow arithmetic of `reserve` now, so that no writer has to wait for it there.

        Raises:
            UnknownDataset: the dataset has no budget.
        """
        pool = self.pool(dataset)
        if pricing.cost(mechanism, pool.renyi_order) > pool.remaining:
            pricing.feasible(mechanism, pool.renyi_order, pool.delta, pool.remaining)

    def explain(self, dataset: str) -> dict[str, Any]:
        """Return a pool's numbers as JSON values, each with the theorem that stands behind it.

        Raises:
            UnknownDataset: the dataset has no budget.
        """
        with self._store.read() as conn:
            pool, holders = get_pool(conn, dataset), holding_keys(conn, dataset)
        return pricing.explanation(pool, holders)


def _move(
    conn: Connection,
    key: str,
    dataset: str,
    kind: str,
    mechanism: Mechanism,
    *,
    held: int,
    spent: int,
) -> None:
    """Change a pool's balance and write the event that says why."""
    conn.execute(
        update(budget_pools)
        .where(budget_pools.c.dataset == dataset)
        .values(held=budget_pools.c.held + held, spent=budget_pools.c.spent + spent)
    )
    conn.execute(
        insert(budget_events).values(
            reservation=key,
            dataset=dataset,
            kind=kind,
            mechanism=mechanism_text(mechanism),
            held_change=held,
            spent_change=spent,
            at=now(),
        )
    )


def _close(
    conn: Connection,
    reservation: Reservation,
    state: ReservationState,
    mechanism: Mechanism,
    cost: int,
) -> Reservation:
    """End a hold, spending `cost` of it."""
    key = reservation.id
    steps_done = mechanism.steps if state is ReservationState.COMMITTED else 0
    conn.execute(
        update(budget_reservations)
        .where(budget_reservations.c.id == key)
        .values(
            state=str(state), mechanism=mechanism_text(mechanism), cost=cost, steps_done=steps_done
        )
    )
    kind = "commit" if state is ReservationState.COMMITTED else "abort"
    _move(conn, key, reservation.dataset, kind, mechanism, held=-reservation.cost, spent=cost)
    return get_reservation(conn, key)


def _check_subject(pool: PoolState, fingerprint: str, unit_column: str) -> None:
    """Refuse to charge a pool for other data, another unit or another adjacency than its own."""
    asked = (fingerprint, unit_column, Neighboring.ADD_OR_REMOVE_ONE)
    kept = (pool.fingerprint, pool.total.unit.column, pool.total.neighboring)
    for name, ours, theirs in zip(("data", "unit", "adjacency"), kept, asked, strict=True):
        if ours != theirs:
            raise UnaccountableMechanism(
                f"the budget of {pool.dataset} is for the {name} {ours!s}, not for {theirs!s}",
                hint="import the changed data as a new dataset",
            )
