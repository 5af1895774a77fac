"""Whom to believe: whose CA may speak for which organisation, and what makes a certificate good.

An organisation's certificates are good only under that organisation's own issuers, as SPIFFE
demands of trust domains: no CA can name another organisation's party.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from llmos.crypto.certificates import MALFORMED, PartyId
from llmos.errors import CertificateRefused, ConfigError

RENEW_AT: Final = 2 / 3  # of a certificate's life
_CRL: Final = re.compile(rb"-----BEGIN X509 CRL-----.+?-----END X509 CRL-----", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Anchor:
    """An organisation with the CAs that sign for its parties, each with its revocation list."""

    organisation: str
    issuers: tuple[x509.Certificate, ...]
    crls: tuple[x509.CertificateRevocationList, ...]

    @property
    def pem(self) -> bytes:
        """Certificates and lists as one PEM text."""
        issuers = [issuer.public_bytes(Encoding.PEM) for issuer in self.issuers]
        return b"".join([*issuers, *(crl.public_bytes(Encoding.PEM) for crl in self.crls)])

    @classmethod
    def parse(cls, organisation: str, pem: bytes) -> Anchor:
        """Read PEM certificates and revocation lists.

        Raises:
            CertificateRefused: one of them cannot be read.
        """
        try:
            issuers = x509.load_pem_x509_certificates(pem)
            crls = [x509.load_pem_x509_crl(block) for block in _CRL.findall(pem)]
        except MALFORMED as error:
            raise CertificateRefused(f"the CA of {organisation} cannot be read: {error}") from error
        return cls(organisation, tuple(issuers), tuple(crls))


def parse_id(uri: str) -> PartyId:
    """Read a SPIFFE ID.

    Raises:
        CertificateRefused: it is not exactly one that `PartyId.uri` writes.
    """
    organisation, _, path = uri.removeprefix("spiffe://").partition("/")
    party = None if path == "authority" else path.removeprefix("party/")
    try:
        found = PartyId(organisation, party)
    except ConfigError as error:
        raise CertificateRefused(f"{uri!r} names no party") from error
    if found.uri != uri:
        raise CertificateRefused(f"{uri!r} names no party")
    return found


def verify(certificate: x509.Certificate, anchors: Iterable[Anchor], at: datetime) -> PartyId:
    """Return whom a certificate names, if an issuer of that organisation signed it.

    There are no intermediates: an anchor's issuers are those that sign for parties. Revocation is
    the TLS stack's matter.

    Raises:
        CertificateRefused: it does not verify at that time, it does not name exactly one party, or
            that party's organisation is not trusted.
    """
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        uris = extension.value.get_values_for_type(x509.UniformResourceIdentifier)
        encoded = certificate.public_bytes(Encoding.DER)
    except (*MALFORMED, x509.ExtensionNotFound) as error:
        raise CertificateRefused("the certificate's names cannot be read") from error
    # the count of unused bits before a signature is signed by nobody, and 0 in DER (X.690, 11.2)
    if not encoded.endswith(b"\x00" + certificate.signature):
        raise CertificateRefused("the certificate is not in its canonical form")
    if len(uris) != 1:  # SPIFFE X509-SVID section 2
        raise CertificateRefused(f"the certificate has {len(uris)} URIs, not one")
    found = parse_id(uris[0])
    issuers = [
        issuer
        for anchor in anchors
        if anchor.organisation == found.organisation
        for issuer in anchor.issuers
    ]
    if not issuers:
        raise CertificateRefused(f"the organisation {found.organisation} is not trusted here")
    path = PolicyBuilder().store(Store(issuers)).time(at).max_chain_depth(0)
    try:
        path.build_client_verifier().verify(certificate, [])
    except VerificationError as error:
        raise CertificateRefused(f"the certificate of {found.uri} is no good: {error}") from error
    return found


def check_crl(crl: x509.CertificateRevocationList, issuer: x509.Certificate, at: datetime) -> int:
    """Return the number of a complete list that `issuer` signed and that is valid at that time.

    Raises:
        CertificateRefused: it is another CA's, forged, partial, from the future or out of date.
    """
    try:
        genuine = crl.issuer == issuer.subject and crl.is_signature_valid(issuer.public_key())  # type: ignore[arg-type]
        number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        partial = any(extension.critical for extension in crl.extensions)
    except (*MALFORMED, x509.ExtensionNotFound) as error:
        raise CertificateRefused("the revocation list cannot be used") from error
    if not genuine or partial:
        raise CertificateRefused("the revocation list is not a complete one of this CA")
    if crl.next_update_utc is None or not crl.last_update_utc <= at < crl.next_update_utc:
        raise CertificateRefused("the revocation list is not valid at this time")
    return number


def renewal_due(certificate: x509.Certificate) -> datetime:
    """Return when two thirds of a certificate's life are over."""
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return start + (end - start) * RENEW_AT
