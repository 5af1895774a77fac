"""This home's party CA: it invites, issues, revokes, and signs what it revoked."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import Connection, Row, delete, insert, select, update

from llmos.crypto import certificates
from llmos.crypto.certificates import CLOCK_SKEW, CRL_LIFE, Authority, PartyId
from llmos.errors import IntegrityError, PartyExists, UnknownParty
from llmos.kernel.identity import Principal
from llmos.kernel.kernel import Kernel
from llmos.kernel.policy import Action, Resource
from llmos.kernel.store import timestamp
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
from llmos.parties.peers import Anchor, parse_id
from llmos.parties.tables import join_tokens, parties, party_authority, party_certificates
from llmos.parties.tokens import JoinToken, fingerprint

TOKEN_LIFE: Final = timedelta(hours=24)
_PEPPER_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class PartyAuthority:
    """The CA of one home, with its key out of the vault."""

    kernel: Kernel
    organisation: str
    authority: Authority
    pepper: bytes = field(repr=False)

    def invite(
        self, name: str, dns: Iterable[str], life: timedelta, who: Principal, at: datetime
    ) -> JoinToken:
        """Let someone join under this name; earlier tokens of the name become void.

        Raises:
            ConfigError: the name or a DNS name is none.
            PartyExists: the party has a certificate that is neither revoked nor out of date.
            PermissionDenied: policy does not let `who` manage parties.
        """
        invited = PartyId(self.organisation, name)
        dns = sorted(set(dns))
        for host in dns:
            certificates.check_dns_name(host)
        token = JoinToken.create(name, self.authority.certificate)
        expires_at = timestamp(at + life)
        details = {"invite": invited.uri, "dns": dns, "token": token.id, "expires_at": expires_at}
        with self.kernel.monitor.act(
            who, Action.MANAGE_PARTIES, home_of(self.kernel), details=details
        ) as conn:
            self._tick(conn, at)
            if any(row.expires_at > timestamp(at) for row in _unrevoked(conn, name)):
                raise PartyExists(
                    f"{invited.uri} has a valid certificate",
                    hint=f"`llmos party revoke {name}` first, or choose another name",
                )
            _void_tokens(conn, name)
            row = {"dns": json.dumps(dns), "invited_at": timestamp(at), "revoked_at": None}
            if not conn.execute(update(parties).where(parties.c.name == name).values(row)).rowcount:
                conn.execute(insert(parties).values(name=name, **row))
            conn.execute(
                insert(join_tokens).values(
                    id=token.id,
                    party=name,
                    token_hmac=token.digest(self.pepper),
                    expires_at=expires_at,
                )
            )
        return token

    def revoke(self, name: str, who: Principal, at: datetime) -> int:
        """Revoke a party's certificates and tokens; return how many certificates that were.

        Raises:
            UnknownParty: there is none of this name.
            PermissionDenied: policy does not let `who` manage parties.
        """
        details: dict[str, Any] = {"revoke": f"spiffe://{self.organisation}/party/{name}"}
        with self.kernel.monitor.act(
            who, Action.MANAGE_PARTIES, home_of(self.kernel), details=details
        ) as conn:
            self._tick(conn, at)
            revoked = [row.serial for row in _unrevoked(conn, name)]
            here, this = {"revoked_at": timestamp(at)}, parties.c.name == name
            if not conn.execute(update(parties).where(this).values(here)).rowcount:
                raise unknown(name)
            chosen = party_certificates.c.serial.in_(revoked)
            conn.execute(update(party_certificates).where(chosen).values(here))
            _void_tokens(conn, name)
            details["serials"] = revoked
            details["crl_number"] = self._sign_crl(conn, at)
        return len(revoked)

    def anchor(self, who: Principal, at: datetime) -> Anchor:
        """Return this CA with its revocation list, signed anew when half of its life is over.

        Raises:
            PermissionDenied: policy does not let `who` admit parties.
        """
        crl = self._crl()
        if crl.last_update_utc + CLOCK_SKEW + CRL_LIFE / 2 <= at:
            details: dict[str, Any] = {}
            with self.kernel.monitor.act(
                who, Action.ADMIT_PARTIES, home_of(self.kernel), details=details
            ) as conn:
                details["crl_number"] = self._sign_crl(conn, at)
            crl = self._crl()
        return Anchor(self.organisation, (self.authority.certificate,), (crl,))

    def active(self) -> frozenset[PartyId]:
        """Return the parties that were not revoked."""
        with self.kernel.store.read() as conn:
            names = conn.execute(select(parties.c.name).where(parties.c.revoked_at.is_(None)))
            return frozenset(PartyId(self.organisation, name) for name in names.scalars())

    def certificates(self, uris: Iterable[str], at: datetime) -> dict[str, str]:
        """Return the newest valid certificate (PEM) of each party.

        Raises:
            UnknownParty: one has none.
        """
        found = {}
        with self.kernel.store.read() as conn:
            for uri in uris:
                name = str(parse_id(uri).party)
                valid = [row for row in _unrevoked(conn, name) if row.expires_at > timestamp(at)]
                if not valid:
                    raise unknown(name)
                found[uri] = max(valid, key=lambda row: row.issued_at).certificate
        return found

    def issue(
        self,
        conn: Connection,
        party: PartyId,
        key: ec.EllipticCurvePublicKey,
        names: Iterable[x509.GeneralName],
        at: datetime,
    ) -> x509.Certificate:
        """Issue and store a party's certificate in the transaction of the act that permits it.

        Raises:
            IntegrityError: the clock was set back.
        """
        self._tick(conn, at)
        issued = self.authority.issue(key, names, at)
        conn.execute(
            insert(party_certificates).values(
                serial=serial_of(issued),
                party=party.party,
                certificate=to_pem(issued),
                issued_at=timestamp(at),
                expires_at=timestamp(issued.not_valid_after_utc),
            )
        )
        return issued

    def certify_server(
        self, key: ec.EllipticCurvePublicKey, life: timedelta, who: Principal, at: datetime
    ) -> x509.Certificate:
        """Certify the key of the server at which parties join.

        Raises:
            PermissionDenied: policy does not let `who` admit parties.
        """
        server = PartyId(self.organisation, None)
        issued = self.authority.issue(key, server.names(()), at, life)
        details = {"server": server.uri, "serial": serial_of(issued)}
        with self.kernel.monitor.act(
            who, Action.ADMIT_PARTIES, home_of(self.kernel), details=details
        ) as conn:
            self._tick(conn, at)
        return issued

    def _sign_crl(self, conn: Connection, at: datetime) -> int:
        """Store a new list; who was revoked stays on it for a list beyond the certificate's end."""
        self._tick(conn, at)
        still = timestamp(at - 2 * CRL_LIFE)
        rows = conn.execute(
            select(party_certificates.c.serial, party_certificates.c.revoked_at).where(
                party_certificates.c.revoked_at.is_not(None),
                party_certificates.c.expires_at > still,
            )
        )
        revoked = [(int(serial, 16), datetime.fromisoformat(when)) for serial, when in rows]
        number = int(conn.execute(select(party_authority.c.crl_number)).scalar_one()) + 1
        crl = crl_to_pem(self.authority.list_revoked(revoked, number, at))
        conn.execute(update(party_authority).values(crl=crl, crl_number=number))
        return number

    def _crl(self) -> x509.CertificateRevocationList:
        with self.kernel.store.read() as conn:
            return crl_from_pem(conn.execute(select(party_authority.c.crl)).scalar_one())

    def _tick(self, conn: Connection, at: datetime) -> None:
        """Refuse to sign at an earlier time than before: expired tokens would be good again.

        Raises:
            IntegrityError: the clock was set back.
        """
        latest = conn.execute(select(party_authority.c.clock)).scalar_one()
        if timestamp(at + CLOCK_SKEW) < latest:
            raise IntegrityError(
                f"this machine's clock shows {timestamp(at)}; the CA signed something at {latest}",
                hint="set the clock",
            )
        conn.execute(update(party_authority).values(clock=max(latest, timestamp(at))))


def create(organisation: str, who: Principal, kernel: Kernel, at: datetime) -> PartyAuthority:
    """Make this home's CA.

    Raises:
        ConfigError: the organisation's name is no lower-case DNS name.
        PartyExists: there is a CA.
        PermissionDenied: policy does not let `who` manage parties.
    """
    authority = Authority.create(generate_key(), organisation, at)
    names = {part: f"party-ca/{part}/{secrets.token_hex(8)}" for part in ("key", "pepper")}
    crl = crl_to_pem(authority.list_revoked((), 1, at))
    details = {"authority": organisation, "sha256": fingerprint(authority.certificate)}
    with kernel.monitor.act(who, Action.MANAGE_PARTIES, home_of(kernel), details=details) as conn:
        if (there := conn.execute(select(party_authority.c.organisation)).scalar()) is not None:
            raise PartyExists(f"this home is the CA of {there} already")
        kernel.vault.seal_secret(names["key"], key_bytes(authority.key))
        kernel.vault.seal_secret(names["pepper"], secrets.token_bytes(_PEPPER_BYTES))
        conn.execute(
            insert(party_authority).values(
                organisation=organisation,
                certificate=to_pem(authority.certificate),
                crl=crl,
                crl_number=1,
                clock=timestamp(at),
                **names,
            )
        )
    return load(kernel)


def load(kernel: Kernel) -> PartyAuthority:
    """Return this home's CA.

    Raises:
        UnknownParty: it has none.
    """
    with kernel.store.read() as conn:
        row = conn.execute(select(party_authority)).one_or_none()
    if row is None:
        raise UnknownParty("this home is no CA", hint="llmos party ca create ORGANISATION")
    authority = Authority(from_pem(row.certificate), load_key(kernel.vault.secret(row.key)))
    return PartyAuthority(kernel, row.organisation, authority, kernel.vault.secret(row.pepper))


def home_of(kernel: Kernel) -> Resource:
    """Return the home as a resource."""
    return Resource("Home", kernel.home_id, {})


def unknown(name: str) -> UnknownParty:
    """Return the error for a party that does not exist."""
    return UnknownParty(f"no party {name!r}", hint="`llmos party ls` lists them")


def _unrevoked(conn: Connection, name: str) -> list[Row[Any]]:
    mine = (party_certificates.c.party == name) & party_certificates.c.revoked_at.is_(None)
    return list(conn.execute(select(party_certificates).where(mine)))


def _void_tokens(conn: Connection, name: str) -> None:
    conn.execute(delete(join_tokens).where(join_tokens.c.party == name))
