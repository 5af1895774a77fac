"""Tenant keys between the root key and the objects' keys.

Object keys of older homes are wrapped directly under a key derived from the root key. That key is
version 0 of the tenant "default", so nothing is wrapped anew here, where no root key is known.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "keys_0002"
down_revision = "keys_0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "tenant_keys",
        sa.Column("tenant", sa.Text, primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("wrapped_key", sa.LargeBinary),
        sa.Column("created_at", sa.Text, nullable=False),
        sa.Column("retired_at", sa.Text),
    )
    op.execute(
        "INSERT INTO tenant_keys (tenant, version, created_at) "
        "SELECT 'default', 0, min(created_at) FROM object_keys HAVING count(*) > 0"
    )
    op.rename_table("object_keys", "object_keys_0001")
    op.create_table(
        "object_keys",
        sa.Column("object_id", sa.Text, primary_key=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("key_version", sa.Integer, nullable=False),
        sa.Column("wrapped_key", sa.LargeBinary, nullable=False),
        sa.Column("created_at", sa.Text, nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant", "key_version"], ["tenant_keys.tenant", "tenant_keys.version"]
        ),
    )
    op.execute(
        "INSERT INTO object_keys "
        "SELECT object_id, kind, 'default', 0, wrapped_key, created_at FROM object_keys_0001"
    )
    op.drop_table("object_keys_0001")
    op.create_index("object_keys_of_version", "object_keys", ["tenant", "key_version"])
