"""Join tokens: the one-time secret by which a partner proves that it is the one who was invited.

A token also carries the SHA-256 of the CA's certificate, so that the partner knows the server, as
`step ca bootstrap --fingerprint` does it; whoever can read a token can join in the partner's place.
"""

from __future__ import annotations

import hmac
import re
import secrets
from dataclasses import dataclass, field
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from llmos.errors import JoinRefused

_SECRET_BYTES: Final = 32
_TOKEN: Final = re.compile(
    r"llmos-join\.([a-z0-9-]{1,63})\.([0-9a-f]{16})\.([A-Za-z0-9_-]{43})\.([0-9a-f]{64})"
)


@dataclass(frozen=True, slots=True)
class JoinToken:
    """Who may join, the secret that shows it, and the CA to which it is shown."""

    party: str
    id: str
    secret: str = field(repr=False)
    authority: str  # SHA-256 of the CA's certificate (DER), hex

    @classmethod
    def create(cls, party: str, authority: x509.Certificate) -> JoinToken:
        """Make a token with a secret of 32 random bytes."""
        secret = secrets.token_urlsafe(_SECRET_BYTES)
        return cls(party, secrets.token_hex(8), secret, fingerprint(authority))

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """Read a token; the message of the error says nothing of the text.

        Raises:
            JoinRefused: it is not a token.
        """
        match = _TOKEN.fullmatch(text.strip())
        if match is None:
            raise JoinRefused(
                "this is not a join token", hint="it is the one line that `party invite` printed"
            )
        return cls(*match.groups())

    @property
    def text(self) -> str:
        """The token as its one line."""
        return f"llmos-join.{self.party}.{self.id}.{self.secret}.{self.authority}"

    def digest(self, pepper: bytes) -> bytes:
        """Return what is stored in its place: HMAC-SHA256 of the whole line."""
        return hmac.digest(pepper, self.text.encode(), "sha256")


def fingerprint(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of a certificate's DER, in hex."""
    return certificate.fingerprint(SHA256()).hex()
