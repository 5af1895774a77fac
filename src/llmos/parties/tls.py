"""Mutual TLS between parties: every context comes from here, and every handshake is checked.

TLS 1.3; the peer's certificate is required and looked up in its CA's revocation list, without a
valid list nobody is believed; then its SPIFFE ID must be one that is expected. Host names prove
nothing here and are not compared: sites move and sit behind proxies, their names do not. No session
is resumed, since a resumed one skips the check of the certificate.
"""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from llmos.crypto.certificates import MALFORMED, PartyId
from llmos.errors import CertificateRefused, LlmosError
from llmos.parties.peers import Anchor, verify

_LOG: Final = logging.getLogger("llmos.parties")


@dataclass(frozen=True, slots=True)
class Credentials:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)


@dataclass(frozen=True, slots=True)
class Terms:
    """Who we are in a handshake, whose certificates we believe, and whom we talk to."""

    credentials: Credentials | None
    anchors: tuple[Anchor, ...]
    expected: frozenset[PartyId]


class PartyContext(ssl.SSLContext):
    """A context whose sockets finish a handshake only with an expected party."""

    terms: Terms

    def check_peer(self, certificate: bytes | None) -> None:
        """Refuse a peer that is not expected; its certificate is DER, None if it showed none.

        Raises:
            ssl.SSLCertVerificationError: there is a certificate, and it is not an expected one.
        """
        if certificate is None:  # only where the context allows it
            return
        try:
            peer = verify(
                x509.load_der_x509_certificate(certificate), self.terms.anchors, datetime.now(UTC)
            )
        except (CertificateRefused, *MALFORMED) as error:
            raise ssl.SSLCertVerificationError(str(error)) from error
        if peer not in self.terms.expected:
            raise ssl.SSLCertVerificationError(f"{peer.uri} is not expected here")


class _Socket(ssl.SSLSocket):
    def do_handshake(self, block: bool = False) -> None:
        super().do_handshake(block)
        _check(self)


class _Object(ssl.SSLObject):
    def do_handshake(self) -> None:
        super().do_handshake()
        _check(self)


def client_context(terms: Terms) -> PartyContext:
    """Return the context by which a party calls another one."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, terms)


def introduction_context() -> ssl.SSLContext:
    """Return the context that fetches a CA's certificate, which is then compared with a pin.

    It believes anybody: nothing that is secret may be sent through it, and nothing that comes from
    it may be used before it was compared.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def server_context(current: Callable[[], Terms], *, optional: bool = False) -> PartyContext:
    """Return the context of a server; it asks for its terms again at each handshake.

    So a revocation holds from the next handshake on. With `optional` a caller may show no
    certificate, as before it has one; one that it shows must be good.
    """

    def renew(
        connection: ssl.SSLSocket | ssl.SSLObject, _name: str | None, _base: ssl.SSLContext
    ) -> int | None:
        try:
            connection.context = _context(ssl.PROTOCOL_TLS_SERVER, current())
        except LlmosError as error:
            _LOG.error("a handshake was refused: %s", error.message)
            return ssl.ALERT_DESCRIPTION_INTERNAL_ERROR
        return None

    context = _context(ssl.PROTOCOL_TLS_SERVER, current())
    context.num_tickets = 0
    context.sni_callback = renew  # also called when no name was sent
    if optional:
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def _context(protocol: int, terms: Terms) -> PartyContext:
    context = PartyContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= (
        ssl.VERIFY_CRL_CHECK_LEAF | ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
    )
    context.sslsocket_class = _Socket
    context.sslobject_class = _Object
    context.terms = terms
    with _in_memory(b"".join(anchor.pem for anchor in terms.anchors)) as path:
        context.load_verify_locations(path)
    if terms.credentials is not None:
        key = terms.credentials.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        with _in_memory(key + terms.credentials.certificate.public_bytes(Encoding.PEM)) as path:
            context.load_cert_chain(path)
    return context


def _check(connection: ssl.SSLSocket | ssl.SSLObject) -> None:
    context = connection.context
    assert isinstance(context, PartyContext)  # noqa: S101 - only such contexts make these
    context.check_peer(connection.getpeercert(binary_form=True))


@contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """Yield a path to a file that exists in memory only: OpenSSL's loaders in Python want one."""
    with open(os.memfd_create("llmos-party"), "wb") as file:  # noqa: PTH123 - a descriptor
        file.write(content)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"
