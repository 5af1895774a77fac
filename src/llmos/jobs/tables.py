"""The tables of jobs, in the kernel's transaction domain."""

from __future__ import annotations

from sqlalchemy import CheckConstraint, Column, ForeignKey, Integer, Table, text

from llmos.kernel.schema import KERNEL, STR

jobs = Table(
    "jobs",
    KERNEL,
    Column("id", STR, primary_key=True),
    Column("kind", STR, nullable=False),
    Column("principal", STR, nullable=False),
    Column("request", STR, nullable=False),  # JSON; the worker needs nothing else
    Column("state", STR, nullable=False),  # queued, running, done, failed, cancelled
    Column("cancel_requested", Integer, nullable=False),
    Column("checkpoint", STR),  # vault object id of the newest complete checkpoint
    Column("result", STR),  # JSON
    Column("error", STR),
    Column("created_at", STR, nullable=False),
    Column("updated_at", STR, nullable=False),
    Column("attempt", Integer, nullable=False, server_default=text("0")),  # runs begun so far
    CheckConstraint(
        "state IN ('queued', 'running', 'done', 'failed', 'cancelled')", name="known_job_state"
    ),
)

job_steps = Table(
    "job_steps",
    KERNEL,
    Column("job", STR, ForeignKey("jobs.id"), primary_key=True),
    Column("name", STR, primary_key=True),
    Column("result", STR, nullable=False),  # JSON
    Column("at", STR, nullable=False),
)
