"""Tenants, whose jobs have a part of the budget, and blocks of datasets that share no person."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "kernel_0008"
down_revision = "kernel_0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("principals", "budget_pools", "budget_reservations"):
        op.add_column(table, sa.Column("tenant", sa.Text))
    op.add_column("datasets", sa.Column("block_of", sa.Text))
