"""This home's own memberships: its keys and certificates as a party of other organisations.

A private key is made here and never leaves: it is sealed in the vault before anything is asked for,
so that a lost answer can be asked for again with the same key.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import CertificateSigningRequestBuilder, Name, SubjectAlternativeName
from sqlalchemy import Connection, Row, Update, delete, insert, select, update

from llmos.crypto.certificates import PartyId
from llmos.errors import CertificateRefused, PartyExists, UnknownParty
from llmos.kernel.identity import Principal
from llmos.kernel.kernel import Kernel
from llmos.kernel.policy import Action
from llmos.parties.authority import home_of
from llmos.parties.encoding import (
    crl_from_pem,
    crl_to_pem,
    from_pem,
    generate_key,
    key_bytes,
    load_key,
    serial_of,
    to_pem,
)
from llmos.parties.peers import Anchor, check_crl, verify
from llmos.parties.tables import memberships
from llmos.parties.tls import Credentials, Terms


@dataclass(frozen=True, slots=True)
class Membership:
    """What this home is in another organisation."""

    id: PartyId
    url: str
    authority: x509.Certificate
    crl: x509.CertificateRevocationList
    certificate: x509.Certificate | None  # None: asked for, not received yet
    key: str  # the vault's secret
    next_key: str | None  # of a renewal that was begun

    @property
    def anchor(self) -> Anchor:
        """The organisation's CA and its newest revocation list."""
        return Anchor(self.id.organisation, (self.authority,), (self.crl,))

    @property
    def is_revoked(self) -> bool:
        """Whether the organisation's newest list has this home's certificate."""
        certificate = self.certificate
        return certificate is not None and (
            self.crl.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None
        )

    def is_good(self, at: datetime) -> bool:
        """Tell whether the certificate is there, in date and not revoked, as far as is known."""
        certificate = self.certificate
        dated = certificate is not None and at <= certificate.not_valid_after_utc
        return dated and not self.is_revoked

    def list_is_over(self, at: datetime) -> bool:
        """Tell whether the revocation list has run out; then nobody there is believed."""
        return self.crl.next_update_utc is None or self.crl.next_update_utc <= at

    def terms(self, kernel: Kernel) -> Terms:
        """Return how this party talks to the server at which it joined."""
        credentials = None
        if self.certificate is not None:
            credentials = Credentials(self.certificate, load_key(kernel.vault.secret(self.key)))
        server = PartyId(self.id.organisation, None)
        return Terms(credentials, (self.anchor,), frozenset({server}))


def request(key: ec.EllipticCurvePrivateKey, party: PartyId) -> bytes:
    """Ask for a party's certificate (PKCS#10, PEM); the signature shows possession of the key."""
    names = SubjectAlternativeName(party.names(()))
    builder = CertificateSigningRequestBuilder(Name([])).add_extension(names, critical=True)
    return builder.sign(key, SHA256()).public_bytes(Encoding.PEM)


def begin(
    party: PartyId, url: str, anchor: Anchor, who: Principal, kernel: Kernel
) -> tuple[Membership, bytes]:
    """Make and seal the key of a new membership; return it and the request for its certificate.

    Joining again before the certificate came goes on with the same key.

    Raises:
        PartyExists: this home is a member of the organisation already.
        PermissionDenied: policy does not let `who` manage parties.
    """
    key, name = generate_key(), _secret_name()
    details: dict[str, Any] = {"join": party.uri, "url": url}
    with kernel.monitor.act(who, Action.MANAGE_PARTIES, home_of(kernel), details=details) as conn:
        there = _row(conn, party.organisation)
        if there is not None and there.certificate is not None:
            raise PartyExists(
                f"this home is {PartyId(there.organisation, there.party).uri} already",
                hint=f"`llmos party leave {there.organisation}` first",
            )
        known = {"party": party.party, "url": url, "crl": crl_to_pem(anchor.crls[0])}
        known["authority"] = to_pem(anchor.issuers[0])
        if there is None:
            kernel.vault.seal_secret(name, key_bytes(key))
            conn.execute(
                insert(memberships).values(organisation=party.organisation, key=name, **known)
            )
        else:
            key = load_key(kernel.vault.secret(there.key))
            conn.execute(_of(party.organisation).values(known))
    return membership(party.organisation, kernel), request(key, party)


def finish(
    member: Membership, certificate: x509.Certificate, who: Principal, kernel: Kernel, at: datetime
) -> Membership:
    """Keep the certificate that was asked for, after it was checked as any peer would check it.

    Raises:
        CertificateRefused: it is not this party's, of another key, or does not verify.
        PermissionDenied: policy does not let `who` manage parties.
    """
    name = member.next_key or member.key
    key = load_key(kernel.vault.secret(name))
    if verify(certificate, [member.anchor], at) != member.id or certificate.public_key() != (
        key.public_key()
    ):
        raise CertificateRefused("the certificate that came is another party's, or of another key")
    details = {"certified": member.id.uri, "serial": serial_of(certificate)}
    with kernel.monitor.act(who, Action.MANAGE_PARTIES, home_of(kernel), details=details) as conn:
        row = {"certificate": to_pem(certificate), "key": name, "next_key": None}
        conn.execute(_of(member.id.organisation).values(row))
    if name != member.key:
        kernel.vault.destroy_secret(member.key)
    return membership(member.id.organisation, kernel)


def begin_renewal(member: Membership, who: Principal, kernel: Kernel) -> tuple[Membership, bytes]:
    """Make and seal the next key, or go on with it; return it and the request for a certificate.

    Raises:
        PermissionDenied: policy does not let `who` manage parties.
    """
    if member.next_key is not None:
        return member, request(load_key(kernel.vault.secret(member.next_key)), member.id)
    key, name = generate_key(), _secret_name()
    details = {"renew": member.id.uri}
    with kernel.monitor.act(who, Action.MANAGE_PARTIES, home_of(kernel), details=details) as conn:
        kernel.vault.seal_secret(name, key_bytes(key))
        conn.execute(_of(member.id.organisation).values(next_key=name))
    return membership(member.id.organisation, kernel), request(key, member.id)


def keep_crl(
    member: Membership,
    crl: x509.CertificateRevocationList,
    who: Principal,
    kernel: Kernel,
    at: datetime,
) -> Membership:
    """Keep the newest revocation list of a membership's CA.

    Raises:
        CertificateRefused: it is forged, out of date, or older than the one that is kept.
        PermissionDenied: policy does not let `who` manage parties.
    """
    number = check_crl(crl, member.authority, at)
    if number < crl_number(member.crl):
        raise CertificateRefused("the revocation list is older than one that was seen before")
    if number > crl_number(member.crl):
        details = {"crl_of": member.id.organisation, "crl_number": number}
        with kernel.monitor.act(
            who, Action.MANAGE_PARTIES, home_of(kernel), details=details
        ) as conn:
            conn.execute(_of(member.id.organisation).values(crl=crl_to_pem(crl)))
    return membership(member.id.organisation, kernel)


def leave(
    organisation: str,
    who: Principal,
    kernel: Kernel,
    *,
    also: Callable[[Connection], None] = lambda _conn: None,
) -> None:
    """End a membership here and destroy its keys; only the organisation's CA can revoke it.

    Args:
        organisation: to leave.
        who: leaves.
        kernel: of the home.
        also: what ends with the membership, in its transaction.

    Raises:
        UnknownParty: this home is no member.
        PermissionDenied: policy does not let `who` manage parties.
    """
    details = {"leave": organisation}
    with kernel.monitor.act(who, Action.MANAGE_PARTIES, home_of(kernel), details=details) as conn:
        row = _row(conn, organisation)
        if row is None:
            raise _unknown(organisation)
        conn.execute(delete(memberships).where(memberships.c.organisation == organisation))
        also(conn)
    for name in (row.key, row.next_key):
        if name is not None:
            kernel.vault.destroy_secret(name)


def membership(organisation: str, kernel: Kernel) -> Membership:
    """Return a membership.

    Raises:
        UnknownParty: this home is no member of this organisation.
    """
    with kernel.store.read() as conn:
        row = _row(conn, organisation)
    if row is None:
        raise _unknown(organisation)
    return _membership(row)


def all_memberships(kernel: Kernel) -> list[Membership]:
    """Return the memberships by organisation."""
    with kernel.store.read() as conn:
        rows = conn.execute(select(memberships).order_by(memberships.c.organisation))
        return [_membership(row) for row in rows]


def crl_number(crl: x509.CertificateRevocationList) -> int:
    """Return the number of a list that was checked before."""
    return crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number


def _membership(row: Row[Any]) -> Membership:
    return Membership(
        id=PartyId(row.organisation, row.party),
        url=row.url,
        authority=from_pem(row.authority),
        crl=crl_from_pem(row.crl),
        certificate=None if row.certificate is None else from_pem(row.certificate),
        key=row.key,
        next_key=row.next_key,
    )


def _row(conn: Connection, organisation: str) -> Row[Any] | None:
    this = memberships.c.organisation == organisation
    return conn.execute(select(memberships).where(this)).one_or_none()


def _of(organisation: str) -> Update:
    return update(memberships).where(memberships.c.organisation == organisation)


def _secret_name() -> str:
    return f"party-key/{secrets.token_hex(8)}"


def _unknown(organisation: str) -> UnknownParty:
    return UnknownParty(
        f"this home is no party of {organisation!r}", hint="`llmos party ls` lists memberships"
    )
