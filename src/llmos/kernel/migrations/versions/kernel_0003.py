"""Several pools for one charge, caps that two people may raise, data derived from other data."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from llmos.kernel.migrations import append_only

revision = "kernel_0003"
down_revision = "kernel_0002"
branch_labels = None
depends_on = None

_LEDGER = ("budget_events", "budget_reservations", "budget_pools")


def upgrade() -> None:
    op.add_column("datasets", sa.Column("parents", sa.Text, nullable=False, server_default="[]"))
    # Homes on PostgreSQL are younger than this revision: there is nothing to carry over.
    old = op.get_bind().dialect.name == "sqlite"
    for table in _LEDGER:  # primary and foreign keys change, which SQLite cannot do in place
        if old:
            op.rename_table(table, f"{table}_0001")
        else:
            op.drop_table(table)
    if old:
        for statement in ("update", "delete"):
            op.execute(f"DROP TRIGGER budget_events_no_{statement}")
    _pools()
    _reservations()
    _events()
    _approvals()
    if old:
        _copy()
        for table in _LEDGER:
            op.drop_table(f"{table}_0001")
    append_only.protect("budget_events")


def _pools() -> None:
    op.create_table(
        "budget_pools",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("dataset", sa.Text, sa.ForeignKey("datasets.name"), nullable=False),
        sa.Column("purpose", sa.Text),
        sa.Column("epsilon", sa.Text, nullable=False),
        sa.Column("delta", sa.Text, nullable=False),
        sa.Column("neighboring", sa.Text, nullable=False),
        sa.Column("unit_column", sa.Text, nullable=False),
        sa.Column("fingerprint", sa.Text, nullable=False),
        sa.Column("renyi_order", sa.Text, nullable=False),
        sa.Column("cap", sa.BigInteger, nullable=False),
        sa.Column("spent", sa.BigInteger, nullable=False),
        sa.Column("held", sa.BigInteger, nullable=False),
        sa.CheckConstraint(
            "spent >= 0 AND held >= 0 AND spent + held <= cap", name="never_overspent"
        ),
    )


def _reservations() -> None:
    op.create_table(
        "budget_reservations",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("dataset", sa.Text, sa.ForeignKey("datasets.name"), nullable=False),
        sa.Column("purpose", sa.Text, nullable=False),
        sa.Column("mechanism", sa.Text, nullable=False),
        sa.Column("steps_done", sa.BigInteger, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.CheckConstraint("state IN ('held', 'committed', 'aborted')", name="known_state"),
        sa.CheckConstraint("steps_done >= 0", name="not_negative"),
    )
    op.create_table(
        "budget_costs",
        sa.Column(
            "reservation", sa.Text, sa.ForeignKey("budget_reservations.id"), primary_key=True
        ),
        sa.Column("pool", sa.Text, sa.ForeignKey("budget_pools.id"), primary_key=True),
        sa.Column("cost", sa.BigInteger, nullable=False),
        sa.CheckConstraint("cost >= 0", name="cost_not_negative"),
    )


def _events() -> None:
    op.create_table(
        "budget_events",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("pool", sa.Text, sa.ForeignKey("budget_pools.id"), nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("reference", sa.Text, nullable=False),
        sa.Column("mechanism", sa.Text),
        sa.Column("cap_change", sa.BigInteger, nullable=False),
        sa.Column("held_change", sa.BigInteger, nullable=False),
        sa.Column("spent_change", sa.BigInteger, nullable=False),
        sa.Column("at", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )


def _approvals() -> None:
    op.create_table(
        "approvals",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("act", sa.Text, nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("request", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("proposer", sa.Text, sa.ForeignKey("principals.id"), nullable=False),
        sa.Column("proposed_at", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("decider", sa.Text, sa.ForeignKey("principals.id")),
        sa.Column("decided_at", sa.Text),
        sa.Column("record", sa.Text),
        sa.CheckConstraint("state IN ('open', 'approved', 'refused')", name="known_approval_state"),
        sa.CheckConstraint("proposer != decider", name="four_eyes"),
    )


def _copy() -> None:
    """Carry the ledger over; a pool's cap becomes its first event."""
    op.execute(
        "INSERT INTO budget_pools SELECT dataset, dataset, NULL, epsilon, delta, neighboring, "
        "unit_column, fingerprint, renyi_order, cap, spent, held FROM budget_pools_0001"
    )
    op.execute(
        "INSERT INTO budget_reservations SELECT r.id, r.dataset, "
        "coalesce(json_extract(j.request, '$.purpose'), ''), r.mechanism, r.steps_done, r.state "
        "FROM budget_reservations_0001 r LEFT JOIN jobs j ON j.id = r.id"
    )
    op.execute("INSERT INTO budget_costs SELECT id, dataset, cost FROM budget_reservations_0001")
    op.execute(
        "INSERT INTO budget_events (pool, kind, reference, cap_change, held_change, spent_change, "
        "at) SELECT p.id, 'create', '', p.cap, 0, 0, d.created_at "
        "FROM budget_pools p JOIN datasets d ON d.name = p.dataset"
    )
    op.execute(
        "INSERT INTO budget_events (pool, kind, reference, mechanism, cap_change, held_change, "
        "spent_change, at) SELECT dataset, kind, reservation, mechanism, 0, held_change, "
        "spent_change, at FROM budget_events_0001 ORDER BY seq"
    )
