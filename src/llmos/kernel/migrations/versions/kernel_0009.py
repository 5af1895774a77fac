"""Federated jobs: those that this home coordinates, and those that it is asked for as a site."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "kernel_0009"
down_revision = "kernel_0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "federated_jobs",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("principal", sa.Text, nullable=False),
        sa.Column("envelope", sa.Text, nullable=False),
        sa.Column("validation", sa.Text),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("rounds_done", sa.BigInteger, nullable=False),
        sa.Column("checkpoint", sa.Text),
        sa.Column("error", sa.Text),
        sa.Column("status", sa.Text),
        sa.Column("created_at", sa.Text, nullable=False),
        sa.Column("updated_at", sa.Text, nullable=False),
    )
    op.create_table(
        "federated_answers",
        sa.Column("job", sa.Text, sa.ForeignKey("federated_jobs.id"), primary_key=True),
        sa.Column("site", sa.Text, primary_key=True),
        sa.Column("envelope", sa.Text, nullable=False),
        sa.Column("at", sa.Text, nullable=False),
    )
    op.create_table(
        "federated_rounds",
        sa.Column("job", sa.Text, sa.ForeignKey("federated_jobs.id"), primary_key=True),
        sa.Column("round", sa.BigInteger, primary_key=True),
        sa.Column("facts", sa.Text, nullable=False),
        sa.Column("at", sa.Text, nullable=False),
    )
    op.create_table(
        "coordinators",
        sa.Column("organisation", sa.Text, primary_key=True),
        sa.Column("keys", sa.Text, nullable=False),
    )
    op.create_table(
        "site_jobs",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("organisation", sa.Text, nullable=False),
        sa.Column("envelope", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("decider", sa.Text),
        sa.Column("reason", sa.Text),
        sa.Column("plan", sa.Text),
        sa.Column("update_round", sa.BigInteger),
        sa.Column("update_object", sa.Text),
        sa.Column("released", sa.Text),
        sa.Column("created_at", sa.Text, nullable=False),
        sa.Column("updated_at", sa.Text, nullable=False),
    )
