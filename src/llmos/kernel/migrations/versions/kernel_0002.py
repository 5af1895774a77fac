"""The results of jobs' steps, and the number of each run of a job."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

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
    for statement in ("UPDATE", "DELETE"):  # a step that completed is never run again
        op.execute(
            f"CREATE TRIGGER job_steps_no_{statement.lower()} BEFORE {statement} "
            "ON job_steps BEGIN SELECT RAISE(ABORT, 'job_steps is append-only'); END"
        )
