"""What is known about the parties of this home's CA, for people and programs to read."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, Row, select

from llmos.crypto.certificates import PartyId
from llmos.kernel.kernel import Kernel
from llmos.kernel.store import timestamp
from llmos.parties.tables import parties, party_authority, party_certificates

_SHOWN: Final = ("serial", "issued_at", "expires_at", "revoked_at", "successor")


def overview(kernel: Kernel, at: datetime) -> list[dict[str, Any]]:
    """Return what is known about each party, by name; certificates newest first."""
    with kernel.store.read() as conn:
        organisation = conn.execute(select(party_authority.c.organisation)).scalar()
        rows = conn.execute(select(parties).order_by(parties.c.name)).all()
        return [_facts(conn, PartyId(str(organisation), row.name), row, at) for row in rows]


def _facts(conn: Connection, party: PartyId, row: Row[Any], at: datetime) -> dict[str, Any]:
    mine = select(party_certificates).where(party_certificates.c.party == row.name)
    issued = conn.execute(mine.order_by(party_certificates.c.issued_at.desc())).all()
    valid = any(one.revoked_at is None and one.expires_at > timestamp(at) for one in issued)
    state = "revoked" if row.revoked_at else "active" if valid else "invited"
    return {
        "name": row.name,
        "id": party.uri,
        "state": "expired" if state == "invited" and issued else state,
        "dns": json.loads(row.dns),
        "invited_at": row.invited_at,
        "revoked_at": row.revoked_at,
        "certificates": [{name: one._mapping[name] for name in _SHOWN} for one in issued],
    }
