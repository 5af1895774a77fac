"""What parties sign with the keys of their certificates: ECDSA P-256 with SHA-256 (FIPS 186-5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256

from llmos.crypto.certificates import MALFORMED
from llmos.errors import CertificateRefused
from llmos.parties.peers import Anchor, verify

Verify = Callable[[str, bytes, bytes], bool]  # SPIFFE ID, message, signature


def sign(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """Sign a message."""
    return key.sign(message, ec.ECDSA(SHA256()))


def verifier(certificates: Mapping[str, str], anchors: Iterable[Anchor], at: datetime) -> Verify:
    """Return what checks signatures of parties, each by its certificate (PEM).

    What was signed before its certificate was revoked stays signed: lists name the second of each
    revocation, and a signature within that second is refused.

    Raises:
        CertificateRefused: a certificate is malformed, another party's, not of an anchor of that
            party's organisation, or at that time out of date or revoked.
    """
    anchors = tuple(anchors)
    keys = {uri: _key(uri, pem, anchors, at) for uri, pem in certificates.items()}

    def verified(party: str, message: bytes, signature: bytes) -> bool:
        if party not in keys:
            return False
        try:
            keys[party].verify(signature, message, ec.ECDSA(SHA256()))
        except InvalidSignature:
            return False
        return True

    return verified


def _key(
    uri: str, pem: str, anchors: tuple[Anchor, ...], at: datetime
) -> ec.EllipticCurvePublicKey:
    try:
        certificate = x509.load_pem_x509_certificate(pem.encode())
    except MALFORMED as error:
        raise CertificateRefused(f"the certificate of {uri} cannot be read") from error
    if verify(certificate, anchors, at).uri != uri:
        raise CertificateRefused(f"a certificate of another party was shown for {uri}")
    for anchor in anchors:
        for crl in anchor.crls:
            listed = crl.get_revoked_certificate_by_serial_number(certificate.serial_number)
            same = crl.issuer == certificate.issuer
            if same and listed is not None and listed.revocation_date_utc <= at:
                raise CertificateRefused(f"the certificate of {uri} was revoked")
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise CertificateRefused(f"the certificate of {uri} has no ECDSA key")
    return key
