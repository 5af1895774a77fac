"""The ledger: what each dataset may still pay for in privacy, and who holds or spent how much.

A pool has a cap on the Renyi divergence at one order that is fixed when the pool is made. A charge
touches every pool that its data and purpose belong to, all of them or none. A job's whole mechanism
is reserved before it starts and settled for the steps it ran; a crash leaves the hold. Jobs may be
chosen after earlier results were seen and may run at the same time: the admission rule is a privacy
filter (Feldman and Zrnic 2020, arXiv:2008.11193; concurrent use: Haney et al. 2023,
arXiv:2309.05901). Amounts are integers of 1e-12 nats, costs rounded up and caps down, so sums are
exact and the database itself refuses an overspent pool. Events are the truth; balances are a cache
that must equal them.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Connection, cast, func, insert, select, update

from llmos.errors import LedgerConflict, UnaccountableMechanism
from llmos.kernel import caps, pricing
from llmos.kernel.pools import (
    Balance,
    Part,
    PoolState,
    Reservation,
    ReservationState,
    as_pool,
    as_reservation,
    charged_pools,
    find_reservation,
    get_held,
    get_pool,
    get_reservation,
    holding_keys,
    mechanism_text,
    reserved_mechanism,
)
from llmos.kernel.schema import budget_costs, budget_events, budget_pools, budget_reservations
from llmos.kernel.store import Store
from llmos.privacy import Mechanism, Neighboring

__all__ = ["Balance", "Budget", "PoolState", "Reservation", "ReservationState"]


class Budget:
    """The pools, reservations and events of one home."""

    def __init__(self, store: Store) -> None:
        """Work on the kernel's store."""
        self._store = store

    def reserve(
        self,
        conn: Connection,
        key: str,
        dataset: str,
        fingerprint: str,
        unit_column: str,
        mechanism: Mechanism,
        *,
        part: Part,
    ) -> Reservation:
        """Hold the whole cost of a mechanism, or return what was reserved under this key before.

        Every pool of the data, the purpose and the tenant pays at its own order, or none does. A
        reservation that was settled or aborted is returned as it stands and holds nothing.

        Raises:
            BudgetExceeded: a pool cannot pay.
            UnaccountableMechanism: the data, unit or adjacency is not that of the pool.
            LedgerConflict: the key belongs to another mechanism, dataset or purpose.
            UnknownDataset: the dataset has no budget.
        """
        pools = charged_pools(conn, dataset, part)
        _check_subject(pools, fingerprint, unit_column)
        if (earlier := find_reservation(conn, key)) is not None:
            asked = (dataset, part.purpose, mechanism)
            if (earlier.dataset, earlier.purpose, reserved_mechanism(conn, key)) != asked:
                raise LedgerConflict(
                    f"{key} has reserved another mechanism, dataset or purpose before"
                )
            return earlier
        costs = {pool.id: pricing.cost(mechanism, pool.renyi_order) for pool in pools}
        for pool in pools:
            if costs[pool.id] > pool.remaining:
                raise pricing.refusal(pool, mechanism, holding_keys(conn, pool.id))
        conn.execute(
            insert(budget_reservations).values(
                id=key,
                dataset=dataset,
                **part._asdict(),
                mechanism=mechanism_text(mechanism),
                steps_done=0,
                state="held",
            )
        )
        for name, cost in costs.items():
            conn.execute(insert(budget_costs).values(reservation=key, pool=name, cost=cost))
            caps.move(conn, name, "reserve", key, mechanism, held=cost)
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
        return _close(conn, reservation, ReservationState.COMMITTED, mechanism)

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
        return _close(conn, reservation, ReservationState.ABORTED, reservation.mechanism)

    def pool(self, pool: str) -> PoolState:
        """Return a pool by its id; a dataset's own pool has the dataset's name.

        Raises:
            UnknownDataset: there is no such pool.
        """
        with self._store.read() as conn:
            return get_pool(conn, pool)

    def pools(self) -> tuple[PoolState, ...]:
        """Return all pools, by id."""
        with self._store.read() as conn:
            rows = conn.execute(select(budget_pools).order_by(budget_pools.c.id))
            return tuple(as_pool(row) for row in rows)

    def charged(self, dataset: str, part: Part) -> tuple[PoolState, ...]:
        """Return every pool that such a job on a dataset is charged to, its own first.

        Raises:
            UnknownDataset: the dataset has no budget.
        """
        with self._store.read() as conn:
            return charged_pools(conn, dataset, part)

    def reservation(self, key: str) -> Reservation:
        """Return a reservation by its key.

        Raises:
            LedgerConflict: nothing was reserved under it.
        """
        with self._store.read() as conn:
            return get_reservation(conn, key)

    def reservations(self, pool: str) -> tuple[Reservation, ...]:
        """Return the reservations that were charged to a pool, oldest first."""
        query = (
            select(budget_reservations)
            .join(budget_events, budget_events.c.reference == budget_reservations.c.id)
            .where(budget_events.c.pool == pool, budget_events.c.kind == "reserve")
            .order_by(budget_events.c.seq)
        )
        with self._store.read() as conn:
            return tuple(as_reservation(conn, row) for row in conn.execute(query).all())

    def recompute(self, pool: str) -> Balance:
        """Return a pool's amounts from its events alone; its balance must equal them."""
        changes = ("cap_change", "spent_change", "held_change")
        sums = (func.coalesce(func.sum(budget_events.c[name]), 0) for name in changes)
        totals = select(*(cast(total, BigInteger) for total in sums))  # PostgreSQL's is a decimal
        with self._store.read() as conn:
            cap, spent, held = tuple(conn.execute(totals.where(budget_events.c.pool == pool)).one())
        return Balance(int(cap), int(spent), int(held))

    def cost(self, pool: str, mechanism: Mechanism) -> int:
        """Return what a mechanism would cost a pool, in 1e-12 nats.

        Raises:
            UnknownDataset: there is no such pool.
        """
        return pricing.cost(mechanism, self.pool(pool).renyi_order)

    def precompute(self, dataset: str, part: Part, mechanism: Mechanism) -> None:
        """Do the slow arithmetic of `reserve` now, so that no writer has to wait for it there.

        Raises:
            UnknownDataset: the dataset has no budget.
        """
        for pool in self.charged(dataset, part):
            pricing.cost(mechanism, pool.renyi_order)

    def holders(self, pool: str) -> tuple[str, ...]:
        """Return the ids of the reservations that hold parts of a pool."""
        with self._store.read() as conn:
            return holding_keys(conn, pool)


def _close(
    conn: Connection, reservation: Reservation, state: ReservationState, mechanism: Mechanism
) -> Reservation:
    """End a hold in every pool, spending what was run or nothing."""
    key, spends = reservation.id, state is ReservationState.COMMITTED
    conn.execute(
        update(budget_reservations)
        .where(budget_reservations.c.id == key)
        .values(
            state=str(state),
            mechanism=mechanism_text(mechanism),
            steps_done=mechanism.steps if spends else 0,
        )
    )
    for pool, held in reservation.costs.items():
        cost = pricing.cost(mechanism, get_pool(conn, pool).renyi_order) if spends else 0
        conn.execute(
            update(budget_costs)
            .where(budget_costs.c.reservation == key, budget_costs.c.pool == pool)
            .values(cost=cost)
        )
        kind = "commit" if spends else "abort"
        caps.move(conn, pool, kind, key, mechanism, held=-held, spent=cost)
    return get_reservation(conn, key)


def _check_subject(pools: tuple[PoolState, ...], fingerprint: str, unit_column: str) -> None:
    """Refuse to charge pools for other data, another unit or another adjacency than their own."""
    own = pools[0]
    kept = [("data", own.fingerprint, fingerprint)]
    kept += [("unit", pool.total.unit.column, unit_column) for pool in pools]
    kept += [("adjacency", p.total.neighboring, Neighboring.ADD_OR_REMOVE_ONE) for p in pools]
    for name, ours, theirs in kept:
        if ours != theirs:
            raise UnaccountableMechanism(
                f"the budget of {own.dataset} is for the {name} {ours!s}, not for {theirs!s}",
                hint="import the changed data as a new dataset",
            )
