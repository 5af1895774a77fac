"""What tests of parties share: CAs, certificates, and two ends of a real TLS connection."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from llmos.config import Config
from llmos.crypto.certificates import CERTIFICATE_LIFE, Authority, PartyId
from llmos.kernel import kernel as kernels
from llmos.parties.encoding import generate_key
from llmos.parties.peers import Anchor
from llmos.parties.tls import Credentials, Terms

if TYPE_CHECKING:
    from cryptography import x509

    from llmos.kernel.kernel import Kernel
    from llmos.parties.authority import PartyAuthority
    from llmos.server.party import PeerProtocol

ORGANISATION = "hospital.example"
NOW = datetime.now(UTC)


@dataclass
class Pki:
    """A CA without a home, to try every good and bad certificate."""

    organisation: str = ORGANISATION
    at: datetime = NOW
    authority: Authority = field(init=False)

    def __post_init__(self) -> None:
        self.authority = Authority.create(generate_key(), self.organisation, self.at)

    def id(self, party: str | None) -> PartyId:
        return PartyId(self.organisation, party)

    def credentials(
        self,
        party: str | None,
        *,
        at: datetime = NOW,
        life: timedelta = CERTIFICATE_LIFE,
        names: list[x509.GeneralName] | None = None,
    ) -> Credentials:
        key = generate_key()
        asked = self.id(party).names(()) if names is None else names
        return Credentials(self.authority.issue(key.public_key(), asked, at, life), key)

    def crl(
        self, *revoked: Credentials, number: int = 1, at: datetime = NOW
    ) -> x509.CertificateRevocationList:
        serials = [(one.certificate.serial_number, at) for one in revoked]
        return self.authority.list_revoked(serials, number, at)

    def anchor(self, *revoked: Credentials, at: datetime = NOW) -> Anchor:
        issuer = self.authority.certificate
        return Anchor(self.organisation, (issuer,), (self.crl(*revoked, at=at),))

    def terms(
        self, me: Credentials | None, *expected: str | None, anchor: Anchor | None = None
    ) -> Terms:
        peers = frozenset(self.id(party) for party in expected)
        return Terms(me, (anchor or self.anchor(),), peers)


@dataclass
class Met:
    """How a handshake ended on both sides, None where it was accepted."""

    server: ssl.SSLError | OSError | None
    client: ssl.SSLError | OSError | None
    answer: bytes = b""
    session: ssl.SSLSession | None = None


def meet(
    server: ssl.SSLContext, client: ssl.SSLContext, *, session: ssl.SSLSession | None = None
) -> Met:
    """Connect over a real socket; the server says one word to whom it accepts."""
    met = Met(None, None)

    def serve(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            try:
                with server.wrap_socket(connection, server_side=True) as accepted:
                    accepted.sendall(b"welcome")
            except OSError as error:
                met.server = error

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        try:
            with (
                socket.create_connection(listening.getsockname(), timeout=30) as raw,
                client.wrap_socket(raw, session=session) as connection,
            ):
                met.answer = connection.recv(16)
                met.session = connection.session
        except OSError as error:
            met.client = error
        finally:
            thread.join(30)
    return met


@contextmanager
def kernel_at(home: Path) -> Iterator[Kernel]:
    """Make a home without models and close it afterwards."""
    made = kernels.create(Config(home=home))
    try:
        yield made
    finally:
        made.store.close()
        made.vault._store.close()


@contextmanager
def door(
    ca: PartyAuthority, *, body_s: float = 10.0, protocol: type[PeerProtocol] | None = None
) -> Iterator[str]:
    """Serve the door of a CA on a free port of this machine and yield its URL."""
    from llmos.parties.door import Door
    from llmos.parties.tls import server_context
    from llmos.server import party
    from llmos.server.binding import bind
    from llmos.server.listener import base_url, make_server

    who, ready = ca.kernel.principal(), threading.Event()
    with bind("127.0.0.1", 0) as listening:
        context = server_context(Door(ca, who).terms, optional=True)
        app = party.build_app(ca, who, body_s)
        server = make_server(app, context, ready.set, protocol=protocol or party.PeerProtocol)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            assert ready.wait(60)
            yield base_url(listening, "127.0.0.1", secure=True)
        finally:
            server.should_exit = True
            thread.join()
