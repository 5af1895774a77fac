"""Renew what is due of this home's certificates as a party, and fetch newer revocation lists."""

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
            done.append(_renew(member, member.certificate, who, kernel, at))
        except LlmosError as error:
            done.append(Renewed(member, renewed=False, error=error))
    return done


def _renew(
    member: Membership, present: x509.Certificate, who: Principal, kernel: Kernel, at: datetime
) -> Renewed:
    listed = call(member.url, introduction_context(), "/party/crl")
    try:
        crl = x509.load_pem_x509_crl(listed)
    except MALFORMED as error:
        raise CertificateRefused("the server's answer is no revocation list") from error
    member = memberships.keep_crl(member, crl, who, kernel, at)
    if crl.get_revoked_certificate_by_serial_number(present.serial_number) is not None:
        raise CertificateRefused(
            f"{member.id.organisation} revoked this home's certificate",
            hint=f"`llmos party leave {member.id.organisation}`, then join by a new token",
        )
    if at < renewal_due(present):
        return Renewed(member, renewed=False)
    member, request = memberships.begin_renewal(member, who, kernel)
    answer = call(member.url, client_context(member.terms(kernel)), "/party/renew", request)
    return Renewed(
        memberships.finish(member, parse_certificate(answer), who, kernel, at), renewed=True
    )
