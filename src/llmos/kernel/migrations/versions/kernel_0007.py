"""Erased people: which units were erased from which part of a dataset, and the receipts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "kernel_0007"
down_revision = "kernel_0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "erasures",
        sa.Column("object_id", sa.Text, primary_key=True),
        sa.Column("unit", sa.Text, primary_key=True),
        sa.Column("dataset", sa.Text, sa.ForeignKey("datasets.name"), nullable=False),
        sa.Column("approval", sa.Text, sa.ForeignKey("approvals.id"), nullable=False),
    )
    op.create_table(
        "erasure_receipts",
        sa.Column("approval", sa.Text, sa.ForeignKey("approvals.id"), primary_key=True),
        sa.Column("envelope", sa.Text, nullable=False),
    )
