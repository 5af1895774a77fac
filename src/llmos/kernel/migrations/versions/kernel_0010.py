"""What sites state after a federated job, and the loss of the global model by round."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "kernel_0010"
down_revision = "kernel_0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "federated_statements",
        sa.Column("job", sa.Text, sa.ForeignKey("federated_jobs.id"), primary_key=True),
        sa.Column("site", sa.Text, primary_key=True),
        sa.Column("part", sa.Text, nullable=False),
        sa.Column("at", sa.Text, nullable=False),
    )
    op.add_column("federated_rounds", sa.Column("loss", sa.Text))
