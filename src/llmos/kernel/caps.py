"""Caps: how much a pool has to spend, and every change of its amounts.

Raising a cap keeps the order. The guarantee is then that of the new cap, provided that the decision
to raise it did not rest on what was released under the old one: no theorem covers a cap that
follows the results, so two people sign for it (`kernel.approvals`) and nothing raises it by itself.
"""

from __future__ import annotations

import math
from fractions import Fraction

from sqlalchemy import Connection, insert, update

from llmos.errors import InvalidPrivacyParameter, LedgerConflict, UnaccountableMechanism
from llmos.kernel import accounting, pricing
from llmos.kernel.pools import WHOLE, Part, PoolState, find_pool, get_pool, mechanism_text, pool_id
from llmos.kernel.schema import budget_events, budget_pools
from llmos.kernel.store import now
from llmos.privacy import Mechanism, Neighboring, PrivacyLoss


def create_pool(
    conn: Connection,
    dataset: str,
    fingerprint: str,
    total: PrivacyLoss,
    part: Part = WHOLE,
) -> PoolState:
    """Give a dataset its budget, or a purpose, a tenant or both their part of it, once.

    Raises:
        InvalidPrivacyParameter: epsilon is out of range, or with this delta too small or too
            large for the filter.
        UnaccountableMechanism: the adjacency is not add-or-remove-one.
        LedgerConflict: there is such a budget already.
    """
    if total.neighboring is not Neighboring.ADD_OR_REMOVE_ONE:
        raise UnaccountableMechanism(f"no filter is known here for {total.neighboring}")
    order = accounting.fixed_order(total.epsilon, total.delta)
    cap = _cap(total.epsilon, total.delta, order)
    name = pool_id(dataset, part)
    if find_pool(conn, name) is not None:
        raise LedgerConflict(f"{name} has a privacy budget already; it is set only once")
    conn.execute(
        insert(budget_pools).values(
            id=name,
            dataset=dataset,
            **part._asdict(),
            epsilon=total.epsilon.hex(),
            delta=total.delta.hex(),
            neighboring=str(total.neighboring),
            unit_column=total.unit.column,
            fingerprint=fingerprint,
            renyi_order=order.hex(),
            cap=0,
            spent=0,
            held=0,
        )
    )
    move(conn, name, "create", "", cap=cap)
    return get_pool(conn, name)


def raise_cap(conn: Connection, pool: str, epsilon: float, *, approval: str) -> PoolState:
    """Raise a pool's cap to that of a larger epsilon at the same delta and order.

    Args:
        conn: an open transaction.
        pool: its id.
        epsilon: of the whole pool from now on.
        approval: under which two people decided it.

    Raises:
        InvalidPrivacyParameter: epsilon is not larger than it was, or too large.
        UnknownDataset: there is no such pool.
    """
    before = get_pool(conn, pool)
    if not epsilon > before.epsilon:
        raise InvalidPrivacyParameter(
            "epsilon", epsilon, f"more than the {before.epsilon:g} that {pool} has"
        )
    cap = _cap(epsilon, before.delta, before.renyi_order)
    conn.execute(
        update(budget_pools).where(budget_pools.c.id == pool).values(epsilon=epsilon.hex())
    )
    move(conn, pool, "raise", approval, cap=cap - before.cap)
    return get_pool(conn, pool)


def _cap(epsilon: float, delta: float, order: float) -> int:
    """Return the integer cap of a guarantee at a Renyi order, rounded down."""
    cap = accounting.renyi_cap(epsilon, delta, order)
    units = math.floor(Fraction(cap) * pricing.UNITS_PER_NAT)
    if not 0 < units < pricing.TOO_MUCH:
        raise InvalidPrivacyParameter(
            "epsilon",
            epsilon,
            f"{'larger' if units <= 0 else 'smaller'} at delta {delta:g}: at Renyi order "
            f"{order:g}, which is fixed for the pool, it leaves {cap:.3g} nats to spend",
        )
    return units


def move(
    conn: Connection,
    pool: str,
    kind: str,
    reference: str,
    mechanism: Mechanism | None = None,
    *,
    cap: int = 0,
    held: int = 0,
    spent: int = 0,
) -> None:
    """Change a pool's balance and write the event that says why."""
    columns = budget_pools.c
    conn.execute(
        update(budget_pools)
        .where(columns.id == pool)
        .values(cap=columns.cap + cap, held=columns.held + held, spent=columns.spent + spent)
    )
    conn.execute(
        insert(budget_events).values(
            pool=pool,
            kind=kind,
            reference=reference,
            mechanism=None if mechanism is None else mechanism_text(mechanism),
            cap_change=cap,
            held_change=held,
            spent_change=spent,
            at=now(),
        )
    )
