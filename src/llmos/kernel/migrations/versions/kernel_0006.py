"""Parties: this home's CA, whom it certifies, its own memberships, and organisations it trusts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "kernel_0006"
down_revision = "kernel_0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "party_authority",
        sa.Column("organisation", sa.Text, primary_key=True),
        sa.Column("certificate", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("pepper", sa.Text, nullable=False),
        sa.Column("crl", sa.Text, nullable=False),
        sa.Column("crl_number", sa.BigInteger, nullable=False),
        sa.Column("clock", sa.Text, nullable=False),
    )
    op.create_table(
        "parties",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("dns", sa.Text, nullable=False),
        sa.Column("invited_at", sa.Text, nullable=False),
        sa.Column("revoked_at", sa.Text),
    )
    op.create_table(
        "party_certificates",
        sa.Column("serial", sa.Text, primary_key=True),
        sa.Column("party", sa.Text, sa.ForeignKey("parties.name"), nullable=False),
        sa.Column("certificate", sa.Text, nullable=False),
        sa.Column("issued_at", sa.Text, nullable=False),
        sa.Column("expires_at", sa.Text, nullable=False),
        sa.Column("revoked_at", sa.Text),
        sa.Column("successor", sa.Text, sa.ForeignKey("party_certificates.serial")),
    )
    op.create_table(
        "join_tokens",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("party", sa.Text, sa.ForeignKey("parties.name"), nullable=False),
        sa.Column("token_hmac", sa.LargeBinary, nullable=False),
        sa.Column("expires_at", sa.Text, nullable=False),
        sa.Column("serial", sa.Text, sa.ForeignKey("party_certificates.serial")),
    )
    op.create_table(
        "trusted_organisations",
        sa.Column("organisation", sa.Text, primary_key=True),
        sa.Column("bundle", sa.Text, nullable=False),
        sa.Column("added_at", sa.Text, nullable=False),
    )
    op.create_table(
        "memberships",
        sa.Column("organisation", sa.Text, primary_key=True),
        sa.Column("party", sa.Text, nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("authority", sa.Text, nullable=False),
        sa.Column("crl", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("certificate", sa.Text),
        sa.Column("next_key", sa.Text),
    )
