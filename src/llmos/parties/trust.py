"""Organisations with a CA of their own, whose parties are believed for that organisation only."""

from __future__ import annotations

from datetime import datetime

from cryptography import x509
from sqlalchemy import Connection, Delete, delete, insert, select

from llmos.crypto.certificates import PartyId, check_dns_name
from llmos.errors import CertificateRefused, PartyExists, UnknownParty
from llmos.kernel.identity import Principal
from llmos.kernel.kernel import Kernel
from llmos.kernel.policy import Action
from llmos.kernel.store import timestamp
from llmos.parties.authority import home_of
from llmos.parties.encoding import crl_from_pem, from_pem
from llmos.parties.memberships import all_memberships, crl_number, membership
from llmos.parties.peers import Anchor, check_crl
from llmos.parties.tables import party_authority, trusted_organisations
from llmos.parties.tls import Terms
from llmos.parties.tokens import fingerprint


def add(organisation: str, pem: bytes, who: Principal, kernel: Kernel, at: datetime) -> Anchor:
    """Trust the CA certificates of an organisation, each with its revocation list.

    Adding the same certificates again replaces their lists by newer ones.

    Raises:
        ConfigError: the organisation's name is no lower-case DNS name.
        CertificateRefused: no CA certificate that signs certificates and lists, one without its
            list, or a list that is forged, out of date or older than before.
        PartyExists: the organisation is known by other certificates.
        PermissionDenied: policy does not let `who` manage parties.
    """
    check_dns_name(organisation)
    given = Anchor.parse(organisation, pem)
    lists = tuple(_checked_list(given, issuer, at) for issuer in given.issuers)
    anchor = Anchor(organisation, given.issuers, lists)
    prints = [fingerprint(issuer) for issuer in anchor.issuers]
    numbers = [crl_number(crl) for crl in lists]
    details = {"trust": organisation, "sha256": prints, "crl_numbers": numbers}
    with kernel.monitor.act(who, Action.MANAGE_PARTIES, home_of(kernel), details=details) as conn:
        _require_free(conn, organisation, kernel)
        before = {there.organisation: there for there in _trusted(conn)}.get(organisation)
        if before is not None:
            _require_newer(before, anchor)
        conn.execute(_delete(organisation))
        row = {"bundle": anchor.pem.decode(), "added_at": timestamp(at)}
        conn.execute(insert(trusted_organisations).values(organisation=organisation, **row))
    return anchor


def remove(organisation: str, who: Principal, kernel: Kernel) -> None:
    """Trust an organisation no longer.

    Raises:
        UnknownParty: it was not trusted.
        PermissionDenied: policy does not let `who` manage parties.
    """
    details = {"distrust": organisation}
    with kernel.monitor.act(who, Action.MANAGE_PARTIES, home_of(kernel), details=details) as conn:
        if not conn.execute(_delete(organisation)).rowcount:
            raise UnknownParty(
                f"the organisation {organisation!r} is not trusted",
                hint="`llmos party trust ls` lists them",
            )


def trusted(kernel: Kernel) -> list[Anchor]:
    """Return the trusted organisations by name."""
    with kernel.store.read() as conn:
        return _trusted(conn)


def anchors(kernel: Kernel) -> tuple[Anchor, ...]:
    """Return whom this home believes: its own CA, the CAs that it joined, those that it trusts."""
    with kernel.store.read() as conn:
        own = conn.execute(select(party_authority)).one_or_none()
    found = {member.id.organisation: member.anchor for member in all_memberships(kernel)}
    if own is not None:  # its own list is newer than one that it fetched from itself
        issuer, crl = from_pem(own.certificate), crl_from_pem(own.crl)
        found[own.organisation] = Anchor(own.organisation, (issuer,), (crl,))
    return (*found.values(), *trusted(kernel))


def terms(organisation: str, expected: frozenset[PartyId], kernel: Kernel) -> Terms:
    """Return how this home, as a party of an organisation, meets the expected other parties.

    For `tls.client_context` and, as a function that is called anew, for `tls.server_context`.

    Raises:
        UnknownParty: this home is no party of the organisation, or has no certificate yet.
    """
    credentials = membership(organisation, kernel).terms(kernel).credentials
    if credentials is None:
        raise UnknownParty(
            f"this home has no certificate of {organisation} yet", hint="llmos party join URL"
        )
    return Terms(credentials, anchors(kernel), expected)


def _trusted(conn: Connection) -> list[Anchor]:
    order = trusted_organisations.c.organisation
    rows = conn.execute(select(trusted_organisations).order_by(order))
    return [Anchor.parse(row.organisation, row.bundle.encode()) for row in rows]


def _require_free(conn: Connection, organisation: str, kernel: Kernel) -> None:
    own = conn.execute(select(party_authority.c.organisation)).scalar()
    joined = {member.id.organisation for member in all_memberships(kernel)}
    if organisation == own or organisation in joined:
        raise PartyExists(f"{organisation} is this home's CA, or one that it joined")


def _require_newer(before: Anchor, anchor: Anchor) -> None:
    if before.issuers != anchor.issuers:
        raise PartyExists(
            f"{anchor.organisation} is known by other certificates",
            hint=f"`llmos party trust remove {anchor.organisation}` first",
        )
    pairs = zip(before.crls, anchor.crls, strict=True)
    if any(crl_number(new) < crl_number(old) for old, new in pairs):
        raise CertificateRefused("the revocation list is older than one that was seen before")


def _checked_list(
    anchor: Anchor, issuer: x509.Certificate, at: datetime
) -> x509.CertificateRevocationList:
    """Return the list of an issuer that may sign for parties."""
    try:
        constraints = issuer.extensions.get_extension_for_class(x509.BasicConstraints).value
        uses = issuer.extensions.get_extension_for_class(x509.KeyUsage).value
    except (ValueError, x509.ExtensionNotFound) as error:
        raise CertificateRefused("a certificate of the bundle is not of a CA") from error
    if not (constraints.ca and uses.key_cert_sign and uses.crl_sign):
        raise CertificateRefused(
            "a certificate of the bundle is not of a CA that signs certificates and lists"
        )
    lists = [crl for crl in anchor.crls if crl.issuer == issuer.subject]
    if len(lists) != 1 or len(anchor.crls) != len(anchor.issuers):
        raise CertificateRefused(
            "the bundle needs one revocation list for each of its certificates",
            hint="put the PEM of both into one file; without a list nobody could be refused",
        )
    check_crl(lists[0], issuer, at)
    return lists[0]


def _delete(organisation: str) -> Delete:
    this = trusted_organisations.c.organisation == organisation
    return delete(trusted_organisations).where(this)
