"""Who is admitted: join tokens become certificates, and certificates become their successors.

A token is used, and a certificate renewed, in the transaction that issues the new certificate. Who
asks again with the same key, because the answer was lost, gets the same certificate again; another
key is refused, so a token or a certificate that was copied shows.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import Connection, Select, select, update

from llmos.crypto.certificates import PartyId, check_request
from llmos.errors import CertificateRefused, JoinRefused
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.kernel.store import timestamp
from llmos.parties.authority import PartyAuthority, home_of
from llmos.parties.encoding import from_pem, serial_of
from llmos.parties.peers import renewal_due
from llmos.parties.tables import join_tokens, parties, party_certificates
from llmos.parties.tokens import JoinToken

_UNUSED: Final = bytes(32)  # compared with when the id is unknown; no HMAC is ever all zeros


@dataclass(frozen=True, slots=True)
class _Claim:
    """A party that has shown who it is, and the certificate that it got for that before."""

    party: PartyId
    names: list[x509.GeneralName]
    answered: x509.Certificate | None


def join(
    token: JoinToken, request: bytes, ca: PartyAuthority, who: Principal, at: datetime
) -> x509.Certificate:
    """Issue the certificate of whom a token invites.

    Refusals are not recorded: anybody can send them, and the log must not grow at their will.

    Raises:
        JoinRefused: the token is unknown, used with another key, or out of date.
        CertificateRefused: the request is malformed or asks for names of another party.
        PermissionDenied: policy does not let `who` admit parties.
    """
    used = update(join_tokens).where(join_tokens.c.id == token.id)
    issued, key = _admit(
        lambda conn: _invited(conn, token, ca, at),
        lambda conn, serial: conn.execute(used.values(serial=serial)),
        {"token": token.id},
        request,
        ca,
        who,
        at,
    )
    if issued.public_key() != key:
        raise JoinRefused(
            "the join token was used already",
            hint="if that was not you, have the party revoked; then ask for a new token",
        )
    return issued


def renew(
    present: x509.Certificate, request: bytes, ca: PartyAuthority, who: Principal, at: datetime
) -> x509.Certificate:
    """Issue the next certificate of a party that has shown its present one.

    Raises:
        CertificateRefused: the present one is not of this CA, revoked, out of date, not due or was
            renewed already with another key; or the request is not acceptable.
        PermissionDenied: policy does not let `who` admit parties.
    """
    serial = serial_of(present)
    renewed = update(party_certificates).where(party_certificates.c.serial == serial)
    issued, key = _admit(
        lambda conn: _renewable(conn, present, ca, at),
        lambda conn, successor: conn.execute(renewed.values(successor=successor)),
        {"renews": serial},
        request,
        ca,
        who,
        at,
    )
    if issued.public_key() != key:
        raise CertificateRefused(
            "this certificate was renewed already, with another key",
            hint="its key may have been copied: have the party revoked and join again",
        )
    return issued


def _admit(
    claimed: Callable[[Connection], _Claim],
    mark: Callable[[Connection, str], object],
    details: dict[str, Any],
    request: bytes,
    ca: PartyAuthority,
    who: Principal,
    at: datetime,
) -> tuple[x509.Certificate, ec.EllipticCurvePublicKey]:
    """Return the certificate of a claim, new or as answered before, and the key that was sent."""
    with ca.kernel.store.read() as conn:
        claim = claimed(conn)
    key = check_request(request, claim.names)
    if claim.answered is not None:
        return claim.answered, key
    details["party"] = claim.party.uri
    with ca.kernel.monitor.act(
        who, Action.ADMIT_PARTIES, home_of(ca.kernel), details=details
    ) as conn:
        claim = claimed(conn)  # another request may have come first
        if claim.answered is not None:
            return claim.answered, key
        issued = ca.issue(conn, claim.party, key, claim.names, at)
        mark(conn, serial_of(issued))
        details["serial"] = serial_of(issued)
    return issued, key


def _invited(conn: Connection, token: JoinToken, ca: PartyAuthority, at: datetime) -> _Claim:
    """Return the claim of a genuine token."""
    row = conn.execute(select(join_tokens).where(join_tokens.c.id == token.id)).one_or_none()
    stored = _UNUSED if row is None else row.token_hmac
    if not hmac.compare_digest(stored, token.digest(ca.pepper)) or row is None:
        raise JoinRefused("the join token is not valid", hint="ask for a new one")
    if row.expires_at <= timestamp(at):
        raise JoinRefused(f"the join token expired at {row.expires_at}", hint="ask for a new one")
    return _claim(conn, row.party, row.serial, ca)


def _renewable(
    conn: Connection, present: x509.Certificate, ca: PartyAuthority, at: datetime
) -> _Claim:
    """Return the claim of a certificate that is due."""
    serial = serial_of(present)
    row = conn.execute(_of_serial(serial)).one_or_none()
    if row is None or from_pem(row.certificate) != present:
        raise CertificateRefused("this certificate is not of this CA")
    if row.revoked_at is not None or row.expires_at <= timestamp(at):
        raise CertificateRefused(
            f"the certificate of {row.party} was revoked or is out of date",
            hint="ask for a new join token",
        )
    due = renewal_due(present)
    if at < due:
        raise CertificateRefused(f"the certificate can be renewed from {timestamp(due)} on")
    return _claim(conn, row.party, row.successor, ca)


def _claim(conn: Connection, name: str, serial: str | None, ca: PartyAuthority) -> _Claim:
    dns = conn.execute(select(parties.c.dns).where(parties.c.name == name)).scalar_one()
    party = PartyId(ca.organisation, name)
    issued = (
        None if serial is None else from_pem(conn.execute(_of_serial(serial)).one().certificate)
    )
    return _Claim(party, party.names(json.loads(dns)), issued)


def _of_serial(serial: str) -> Select[Any]:
    return select(party_certificates).where(party_certificates.c.serial == serial)
