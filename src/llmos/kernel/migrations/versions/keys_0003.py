"""Keys of single units, under which their records are sealed inside a dataset's objects."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "keys_0003"
down_revision = "keys_0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "unit_keys",
        sa.Column("object_id", sa.Text, sa.ForeignKey("object_keys.object_id"), primary_key=True),
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("key_version", sa.Integer, nullable=False),
        sa.Column("wrapped_key", sa.LargeBinary),
        sa.Column("destroyed_sha256", sa.Text),
        sa.ForeignKeyConstraint(
            ["tenant", "key_version"], ["tenant_keys.tenant", "tenant_keys.version"]
        ),
        sqlite_with_rowid=False,
    )
    op.create_index("unit_keys_of_version", "unit_keys", ["tenant", "key_version"])
