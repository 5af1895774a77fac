"""The API keys that were ever issued, as lists show them; `kernel.identity` judges them."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, select

from llmos.kernel.identity import narrowed
from llmos.kernel.schema import api_keys, principals


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is known about an issued key; times are RFC 3339 text."""

    id: str
    principal: str  # name
    label: str
    models: frozenset[str] | None  # None: every model; so are the next two
    actions: frozenset[str] | None
    purpose: str | None
    created_at: str
    expires_at: str | None
    revoked_at: str | None
    last_used_at: str | None


def issued(conn: Connection) -> tuple[ApiKey, ...]:
    """Return all keys, oldest first."""
    query = select(api_keys, principals.c.name).join(principals)
    rows = conn.execute(query.order_by(api_keys.c.created_at, api_keys.c.id)).all()
    plain = ("id", "label", "created_at", "expires_at", "revoked_at", "last_used_at")
    return tuple(
        ApiKey(principal=row.name, **narrowed(row), **{name: row._mapping[name] for name in plain})
        for row in rows
    )
