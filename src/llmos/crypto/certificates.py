"""X.509 for parties, the issuing side: a private CA, whom it certifies, its revocation list.

Profiles: RFC 5280, and SPIFFE X509-SVID for whom a certificate names. Keys are ECDSA P-256, since
TLS stacks on BoringSSL, gRPC's among them, refuse Ed25519 (github.com/grpc/grpc/issues/24252).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import ExtendedKeyUsageOID

from llmos.errors import CertificateRefused, ConfigError

CERTIFICATE_LIFE: Final = timedelta(days=30)
AUTHORITY_LIFE: Final = timedelta(days=3650)
CRL_LIFE: Final = timedelta(hours=24)
CLOCK_SKEW: Final = timedelta(minutes=5)  # what is issued is valid that much earlier
_USES: Final = (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)
_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")  # RFC 1123 section 2.1
_LONGEST_NAME: Final = 63  # characters; X.520 allows an organisation 64
_NO_USE: Final = dict.fromkeys(
    ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
     "key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"), False
)  # fmt: skip
# What the parsers raise on bytes that somebody made up.
MALFORMED: Final = (
    ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.InvalidVersion,
    x509.UnsupportedGeneralNameType)  # fmt: skip


@dataclass(frozen=True, slots=True, order=True)
class PartyId:
    """Whom a certificate names: a party of an organisation, or that organisation's CA itself."""

    organisation: str  # SPIFFE trust domain
    party: str | None  # None: the server at which parties join

    def __post_init__(self) -> None:
        """Refuse an organisation that is no DNS name, or a party that is not one label.

        Raises:
            ConfigError: a name cannot be that of an organisation or a party.
        """
        check_dns_name(self.organisation)
        if self.party is not None and not _LABEL.fullmatch(self.party):
            raise ConfigError(
                f"not a name of a party: {self.party!r}",
                hint="at most 63 lower-case letters, digits and inner hyphens",
            )

    @property
    def uri(self) -> str:
        """The SPIFFE ID."""
        path = "authority" if self.party is None else f"party/{self.party}"
        return f"spiffe://{self.organisation}/{path}"

    def names(self, dns: Iterable[str]) -> list[x509.GeneralName]:
        """Return what the party's certificate says in its subject's alternative names."""
        return [x509.UniformResourceIdentifier(self.uri), *(x509.DNSName(name) for name in dns)]


@dataclass(frozen=True, slots=True)
class Authority:
    """A private CA: its self-signed certificate and the key that signs."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @classmethod
    def create(cls, key: ec.EllipticCurvePrivateKey, organisation: str, at: datetime) -> Authority:
        """Make the certificate of a new CA; it signs leaves and lists, and no further CA."""
        check_dns_name(organisation)
        name = x509.Name.from_rfc4514_string(f"CN=LLMOS parties,O={organisation}")
        uses = x509.KeyUsage(**_NO_USE | {"key_cert_sign": True, "crl_sign": True})
        domain = x509.UniformResourceIdentifier(f"spiffe://{organisation}")
        made = (
            _builder(name, name, key.public_key(), at, at + AUTHORITY_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(uses, critical=True)
            .add_extension(x509.SubjectAlternativeName([domain]), critical=False)
        )
        return cls(made.sign(key, SHA256()), key)

    def issue(
        self,
        key: ec.EllipticCurvePublicKey,
        names: Iterable[x509.GeneralName],
        at: datetime,
        life: timedelta = CERTIFICATE_LIFE,
    ) -> x509.Certificate:
        """Certify that this key belongs to these names, as client and as server."""
        end = min(at + life, self.certificate.not_valid_after_utc)
        uses = x509.KeyUsage(**_NO_USE | {"digital_signature": True})
        return (
            _builder(self.certificate.subject, x509.Name([]), key, at, end)
            .add_extension(self._key_identifier(), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(uses, critical=True)
            .add_extension(x509.ExtendedKeyUsage(_USES), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
            .sign(self.key, SHA256())
        )

    def list_revoked(
        self, revoked: Iterable[tuple[int, datetime]], number: int, at: datetime
    ) -> x509.CertificateRevocationList:
        """Sign the list of revoked serial numbers, each with its time (RFC 5280 section 5)."""
        builder = x509.CertificateRevocationListBuilder(self.certificate.subject)
        for serial, when in revoked:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder(serial, when).build()
            )
        return (
            builder.last_update(at - CLOCK_SKEW)
            .next_update(at + CRL_LIFE)
            .add_extension(self._key_identifier(), critical=False)
            .add_extension(x509.CRLNumber(number), critical=False)
            .sign(self.key, SHA256())
        )

    def _key_identifier(self) -> x509.AuthorityKeyIdentifier:
        own = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own.value)


def check_request(pem: bytes, names: Iterable[x509.GeneralName]) -> ec.EllipticCurvePublicKey:
    """Return the key of a request (PKCS#10, RFC 2986) that asks for none but these names.

    Raises:
        CertificateRefused: it is malformed, its signature is wrong, its key is not P-256, or it
            asks for another name or another extension.
    """
    try:
        asked = x509.load_pem_x509_csr(pem)
        key, extensions, signed = asked.public_key(), asked.extensions, asked.is_signature_valid
    except MALFORMED as error:
        raise CertificateRefused("the certificate request cannot be read") from error
    if not signed:
        raise CertificateRefused("the certificate request is not signed by its own key")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise CertificateRefused("the certificate request's key is not ECDSA P-256")
    for wanted in (extension.value for extension in extensions):
        if not isinstance(wanted, x509.SubjectAlternativeName) or not set(wanted) <= set(names):
            raise CertificateRefused("the request asks for more than this party's own names")
    return key


def check_dns_name(name: str) -> None:
    """Accept lower-case DNS names of at most 63 characters.

    Raises:
        ConfigError: it is not one.
    """
    labels = name.split(".")
    if len(name) > _LONGEST_NAME or not all(_LABEL.fullmatch(label) for label in labels):
        raise ConfigError(f"not a lower-case DNS name: {name!r}", hint="such as clinic.example")


def _builder(
    issuer: x509.Name,
    subject: x509.Name,
    key: ec.EllipticCurvePublicKey,
    at: datetime,
    end: datetime,
) -> x509.CertificateBuilder:
    """Begin a certificate with a random serial number of 159 bits."""
    return (
        x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number())
        .not_valid_before(at - CLOCK_SKEW)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )
