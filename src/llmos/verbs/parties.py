"""The verbs on parties: this home's CA, its memberships, and whom it trusts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from llmos.kernel.policy import Action
from llmos.kernel.store import timestamp
from llmos.parties import authority, memberships, register, trust
from llmos.parties.encoding import serial_of
from llmos.parties.memberships import Membership
from llmos.parties.peers import Anchor, renewal_due
from llmos.parties.tokens import JoinToken, fingerprint
from llmos.workflows.parts import Parts

if TYPE_CHECKING:
    from llmos.workflows.renew_parties import Renewed


@dataclass(frozen=True, slots=True)
class PartyVerbs:
    """What a home does as CA, as party, and towards other organisations."""

    parts: Parts

    def create_authority(self, organisation: str) -> Anchor:
        """Make this home the CA of an organisation."""
        who = self.parts.who
        made = authority.create(organisation, who, self.parts.kernel, datetime.now(UTC))
        return made.anchor(who, datetime.now(UTC))

    def bundle(self) -> Anchor:
        """Return this home's CA and its revocation list, signed anew when it is due."""
        ca = authority.load(self.parts.kernel)
        return ca.anchor(self.parts.who, datetime.now(UTC))

    def invite(self, name: str, *, dns: Sequence[str] = (), hours: float = 24.0) -> JoinToken:
        """Return a token by which someone may join once under this name."""
        ca, life = authority.load(self.parts.kernel), timedelta(hours=hours)
        return ca.invite(name, dns, life, self.parts.who, datetime.now(UTC))

    def revoke(self, name: str) -> int:
        """Revoke a party's certificates and tokens; return how many certificates that were."""
        ca = authority.load(self.parts.kernel)
        return ca.revoke(name, self.parts.who, datetime.now(UTC))

    def overview(self) -> list[dict[str, Any]]:
        """Return what is known about each party of this home's CA."""
        self._authorize_reading()
        return register.overview(self.parts.kernel, datetime.now(UTC))

    def party(self, name: str) -> dict[str, Any]:
        """Return what is known about one party.

        Raises:
            UnknownParty: there is none of this name.
        """
        for facts in self.overview():
            if facts["name"] == name:
                return facts
        raise authority.unknown(name)

    def join(self, url: str, token: str) -> dict[str, Any]:
        """Join an organisation by a token."""
        from llmos.workflows import join_party

        who = self.parts.who
        return membership_facts(
            join_party.run(url, token, who, self.parts.kernel, datetime.now(UTC))
        )

    def renew(self) -> list[Renewed]:
        """Renew this home's certificates that are due, and fetch the newest revocation lists."""
        from llmos.workflows import renew_parties

        return renew_parties.run(self.parts.who, self.parts.kernel, datetime.now(UTC))

    def leave(self, organisation: str) -> list[str]:
        """End a membership here and destroy its keys; return jobs that hold budget still.

        Raises:
            JobError: a job of it runs here, and the certificate is good.
            JobBusy: this home's agent is at work there.
        """
        from llmos.workflows import leave_party

        return leave_party.run(organisation, self.parts.who, self.parts, datetime.now(UTC))

    def memberships(self) -> list[dict[str, Any]]:
        """Return what is known about this home's memberships."""
        self._authorize_reading()
        return [
            membership_facts(member) for member in memberships.all_memberships(self.parts.kernel)
        ]

    def trust(self, organisation: str, pem: bytes) -> dict[str, Any]:
        """Trust an organisation's own CA for that organisation's parties."""
        who, at = self.parts.who, datetime.now(UTC)
        return anchor_facts(trust.add(organisation, pem, who, self.parts.kernel, at))

    def distrust(self, organisation: str) -> None:
        """Trust an organisation no longer."""
        trust.remove(organisation, self.parts.who, self.parts.kernel)

    def trusted(self) -> list[dict[str, Any]]:
        """Return the organisations whose own CAs are trusted."""
        self._authorize_reading()
        return [anchor_facts(anchor) for anchor in trust.trusted(self.parts.kernel)]

    def _authorize_reading(self) -> None:
        home = authority.home_of(self.parts.kernel)
        self.parts.kernel.monitor.authorize(self.parts.who, Action.READ_LOG, home)


def membership_facts(member: Membership) -> dict[str, Any]:
    """Return a membership as a program reads it."""
    certificate = member.certificate
    return {
        "id": member.id.uri,
        "organisation": member.id.organisation,
        "party": member.id.party,
        "url": member.url,
        "authority_sha256": fingerprint(member.authority),
        "serial": certificate and serial_of(certificate),
        "expires_at": certificate and timestamp(certificate.not_valid_after_utc),
        "renew_at": certificate and timestamp(renewal_due(certificate)),
        "crl_until": _crl_until(member.anchor)[0],
    }


def anchor_facts(anchor: Anchor) -> dict[str, Any]:
    """Return a CA as a program reads it."""
    return {
        "organisation": anchor.organisation,
        "sha256": [fingerprint(issuer) for issuer in anchor.issuers],
        "expires_at": [timestamp(issuer.not_valid_after_utc) for issuer in anchor.issuers],
        "crl_until": _crl_until(anchor),
    }


def _crl_until(anchor: Anchor) -> list[str]:
    ends = [crl.next_update_utc for crl in anchor.crls]
    return [timestamp(end) for end in ends if end is not None]
