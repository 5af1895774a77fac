"""Keys of parties, and certificates and keys as text and bytes, as database rows keep them."""

from __future__ import annotations

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)


def generate_key() -> ec.EllipticCurvePrivateKey:
    """Make a P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def serial_of(certificate: x509.Certificate) -> str:
    """Return a certificate's serial number in hex, as OpenSSL prints it."""
    return f"{certificate.serial_number:040x}"


def to_pem(certificate: x509.Certificate) -> str:
    """Return a certificate as PEM text."""
    return certificate.public_bytes(Encoding.PEM).decode()


def key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as the vault keeps it: PKCS#8 DER."""
    return key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


def load_key(der: bytes) -> ec.EllipticCurvePrivateKey:
    """Read a private key that `key_bytes` wrote."""
    key = load_der_private_key(der, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)  # noqa: S101 - the vault vouches for it
    return key


def from_pem(pem: str) -> x509.Certificate:
    """Read a certificate that `to_pem` wrote."""
    return x509.load_pem_x509_certificate(pem.encode())


def crl_to_pem(crl: x509.CertificateRevocationList) -> str:
    """Return a revocation list as PEM text."""
    return crl.public_bytes(Encoding.PEM).decode()


def crl_from_pem(pem: str) -> x509.CertificateRevocationList:
    """Read a revocation list that `crl_to_pem` wrote."""
    return x509.load_pem_x509_crl(pem.encode())
