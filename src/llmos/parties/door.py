"""The door of this home's CA: the certificate of the server at which parties join.

It lives for a day and is made in memory; a new one is made at a handshake when it is due.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from llmos.kernel.identity import Principal
from llmos.parties.authority import PartyAuthority
from llmos.parties.encoding import generate_key
from llmos.parties.peers import renewal_due
from llmos.parties.tls import Credentials, Terms

DOOR_LIFE: Final = timedelta(hours=24)


@dataclass(slots=True)
class Door:
    """What the server says in each handshake, and whom it lets in."""

    ca: PartyAuthority
    who: Principal
    _credentials: Credentials | None = field(default=None, repr=False)

    def terms(self) -> Terms:
        """Return the terms of a handshake now: who was revoked before is not let in."""
        at = datetime.now(UTC)
        own = self._credentials
        if own is None or renewal_due(own.certificate) <= at:
            key = generate_key()
            certificate = self.ca.certify_server(key.public_key(), DOOR_LIFE, self.who, at)
            self._credentials = own = Credentials(certificate, key)
        return Terms(own, (self.ca.anchor(self.who, at),), self.ca.active())
