"""Kinds of principals, narrowed keys, passwords, policies in force and approvals used later."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "kernel_0005"
down_revision = "kernel_0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    kind = sa.Column("kind", sa.Text, nullable=False, server_default="person")
    op.add_column("principals", kind)
    for name in ("actions", "purpose", "last_used_at"):
        op.add_column("api_keys", sa.Column(name, sa.Text))
    op.add_column("approvals", sa.Column("used_at", sa.Text))
    op.create_table(
        "policy_versions",
        sa.Column("digest", sa.Text, primary_key=True),
        sa.Column("files", sa.Text, nullable=False),
    )
    op.create_table(
        "credentials",
        sa.Column("principal_id", sa.Text, sa.ForeignKey("principals.id"), primary_key=True),
        sa.Column("password_hash", sa.Text, nullable=False),
        sa.Column("totp_seed", sa.LargeBinary),
        sa.Column("totp_step", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "login_attempts",
        sa.Column("subject", sa.Text, primary_key=True),
        sa.Column("failures", sa.BigInteger, nullable=False),
        sa.Column("barred_until", sa.Text),
    )
