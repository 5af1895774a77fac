"""What the log says of the rest of kernel.db: a digest of the rows that each act left behind.

The signed entry of an act names the rows of the small tables that say who may do what, which data
and models there are and what they may still spend. Whoever changes such a row without an act is
found as soon as the home is opened or its log is verified. Tables that grow with every job are left
out: the digest is made at every append. Their rows are compared with the log by `llmos doctor`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Final

from sqlalchemy import Connection

TABLES: Final = (
    "api_keys",
    "approvals",
    "budget_pools",
    "datasets",
    "log_partners",
    "models",
    "principals",
    "settings",
    "witnessed",
)


def digest(conn: Connection) -> str:
    """Return the schema's revision, a colon and SHA-256 over the rows of `TABLES`, in hex."""

    def rows(name: str) -> list[str]:
        found = conn.exec_driver_sql(f"SELECT * FROM {name}")  # noqa: S608 - a name of ours
        return sorted(json.dumps([*row], default=list) for row in found)  # bytes as numbers

    held = json.dumps({name: rows(name) for name in TABLES})
    revision = conn.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one()
    return f"{revision}:{hashlib.sha256(held.encode()).hexdigest()}"


def agrees(conn: Connection, said: str | None) -> bool:
    """Tell whether the rows have the digest that an entry names, if it names one of this schema."""
    found = digest(conn)
    return said is None or said == found or said.split(":")[0] != found.split(":")[0]
