"""The results of jobs' steps, and the number of each run of a job."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from llmos.kernel.migrations import append_only

revision = "kernel_0002"
down_revision = "kernel_0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "jobs", sa.Column("attempt", sa.Integer, nullable=False, server_default=sa.text("0"))
    )
    op.create_table(
        "job_steps",
        sa.Column("job", sa.Text, sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("result", sa.Text, nullable=False),
        sa.Column("at", sa.Text, nullable=False),
    )
    append_only.protect("job_steps")  # a step that completed is never run again
