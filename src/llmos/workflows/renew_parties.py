"""Renew what is due of this home's certificates as a party, and fetch newer revocation lists.

For `llmos party renew`, and for an agent that goes on for longer than either is good.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from cryptography import x509

from llmos.crypto.certificates import MALFORMED
from llmos.errors import CertificateRefused, LlmosError
from llmos.kernel.identity import Principal
from llmos.kernel.kernel import Kernel
from llmos.kernel.policy import Action
from llmos.parties import memberships
from llmos.parties.authority import home_of
from llmos.parties.exchange import call
from llmos.parties.memberships import Membership
from llmos.parties.peers import renewal_due
from llmos.parties.tls import client_context, introduction_context
from llmos.workflows.join_party import parse_certificate


@dataclass(frozen=True, slots=True)
class Renewed:
    """How it went with one membership."""

    member: Membership
    renewed: bool
    error: LlmosError | None = None


def run(who: Principal, kernel: Kernel, at: datetime) -> list[Renewed]:
    """Go through all memberships; one that fails does not keep the others from it.

    Raises:
        PermissionDenied: policy does not let `who` manage parties.
    """
    kernel.monitor.authorize(who, Action.MANAGE_PARTIES, home_of(kernel))
    done = []
    for member in memberships.all_memberships(kernel):
        if member.certificate is None:
            continue  # asked for, not received yet: `party join` goes on with it
        try:
            done.append(renew(member, who, kernel, at))
        except LlmosError as error:
            done.append(Renewed(member, renewed=False, error=error))
    return done


def is_due(member: Membership, at: datetime) -> bool:
    """Tell whether half of a revocation list's life, or two thirds of a certificate's, are over."""
    start, end = member.crl.last_update_utc, member.crl.next_update_utc
    listed = end is None or at >= start + (end - start) / 2
    return listed or (member.certificate is not None and at >= renewal_due(member.certificate))


def renew(member: Membership, who: Principal, kernel: Kernel, at: datetime) -> Renewed:
    """Fetch the newest revocation list of one membership, and the next certificate if it is due.

    Raises:
        CertificateRefused: the list is no good, this home's certificate was revoked, or one of the
            two sides does not accept the other's.
        JoinRefused: the server refuses to renew.
        NetworkError: it cannot be reached.
        PermissionDenied: policy does not let `who` manage parties.
    """
    listed = call(member.url, introduction_context(), "/party/crl")
    try:
        crl = x509.load_pem_x509_crl(listed)
    except MALFORMED as error:
        raise CertificateRefused("the server's answer is no revocation list") from error
    member = memberships.keep_crl(member, crl, who, kernel, at)
    if member.is_revoked:
        raise CertificateRefused(
            f"{member.id.organisation} revoked this home's certificate",
            hint=f"`llmos party leave {member.id.organisation}`, then join by a new token",
        )
    if member.certificate is None or at < renewal_due(member.certificate):
        return Renewed(member, renewed=False)
    member, request = memberships.begin_renewal(member, who, kernel)
    answer = call(member.url, client_context(member.terms(kernel)), "/party/renew", request)
    return Renewed(
        memberships.finish(member, parse_certificate(answer), who, kernel, at), renewed=True
    )
