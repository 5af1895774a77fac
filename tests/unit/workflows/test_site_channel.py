"""A site's calls: what it makes of a server that closes the connection."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.x509 import load_pem_x509_csr
from tests.homes import close
from tests.parties import ORGANISATION, Pki

from llmos import system as systems
from llmos.errors import CertificateRefused, NetworkError
from llmos.parties import memberships
from llmos.system import System
from llmos.workflows.site_channel import SiteChannel

MONTH = timedelta(days=30)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[System]:
    made = systems.create(tmp_path / "home")
    yield made
    close(made)


@pytest.fixture
def closing() -> Iterator[str]:
    """Serve nothing: close each connection without a word."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    listening.accept()[0].close()
                except OSError:
                    return

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"https://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


def join(site: System, url: str, at: datetime) -> None:
    """Make the home a member with a certificate of a month from then on."""
    pki = Pki(at=at)
    member, asked = memberships.begin(pki.id("site"), url, pki.anchor(at=at), site.who, site.kernel)
    key = load_pem_x509_csr(asked).public_key()
    assert isinstance(key, EllipticCurvePublicKey)
    issued = pki.authority.issue(key, member.id.names(()), at, MONTH)
    memberships.finish(member, issued, site.who, site.kernel, at)


def test_a_closed_connection_is_tried_again(site: System, closing: str) -> None:
    join(site, closing, datetime.now(UTC) - MONTH / 2)
    with pytest.raises(NetworkError, match="closed the connection without an answer"):
        SiteChannel(ORGANISATION, site.parts).coordinator_key()


def test_with_an_expired_certificate_it_is_not(site: System, closing: str) -> None:
    join(site, closing, datetime.now(UTC) - MONTH - timedelta(minutes=1))
    with pytest.raises(CertificateRefused, match="this home's certificate expired at") as refused:
        SiteChannel(ORGANISATION, site.parts).coordinator_key()
    assert f"llmos party leave {ORGANISATION}" in str(refused.value.hint)
