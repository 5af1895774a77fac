"""Whom the CA certifies, and what it refuses to read."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st
from tests.parties import Pki

from llmos.crypto.certificates import (
    AUTHORITY_LIFE,
    CERTIFICATE_LIFE,
    CLOCK_SKEW,
    CRL_LIFE,
    Authority,
    PartyId,
    check_request,
)
from llmos.errors import CertificateRefused, ConfigError
from llmos.parties.encoding import generate_key
from llmos.parties.memberships import request

AT = datetime(2026, 11, 23, 12, tzinfo=UTC)
SITE = PartyId("hospital.example", "site-a")
KEY = generate_key()
PKI = Pki(at=AT)


def asked(*extensions: tuple[x509.ExtensionType, bool], key: object = KEY) -> bytes:
    builder = x509.CertificateSigningRequestBuilder(x509.Name([]))
    for value, critical in extensions:
        builder = builder.add_extension(value, critical=critical)
    digest = None if isinstance(key, ed25519.Ed25519PrivateKey) else SHA256()
    return builder.sign(key, digest).public_bytes(Encoding.PEM)  # type: ignore[arg-type]


def alternative(*names: x509.GeneralName) -> tuple[x509.ExtensionType, bool]:
    return x509.SubjectAlternativeName(names), True


URI = x509.UniformResourceIdentifier(SITE.uri)
REQUEST = x509.load_pem_x509_csr(request(KEY, SITE)).public_bytes(Encoding.DER)


@pytest.mark.parametrize(
    "name", ["", "A", "a.b", "-a", "a-", "a_b", "a" * 64, "ä", "a/b", "..", "a\n"]
)
def test_a_party_is_one_dns_label(name: str) -> None:
    with pytest.raises(ConfigError):
        PartyId("hospital.example", name)


@pytest.mark.parametrize(
    "name", ["", "Hospital.example", ".example", "a..b", "a.", "a/b", "a,CN=b", "a." * 31 + "bb"]
)
def test_an_organisation_is_a_lower_case_dns_name(name: str) -> None:
    with pytest.raises(ConfigError):
        PartyId(name, "site")
    with pytest.raises(ConfigError):
        Authority.create(KEY, name, AT)


def test_the_longest_names_make_certificates() -> None:
    organisation, party = f"{'a' * 55}.example", "b" * 63
    pki = Pki(organisation)
    names = pki.credentials(party).certificate.extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.UniformResourceIdentifier) == [
        f"spiffe://{organisation}/party/{party}"
    ]


def test_the_ca_signs_leaves_and_lists_only() -> None:
    made = PKI.authority.certificate
    assert made.not_valid_before_utc == AT - CLOCK_SKEW
    assert made.not_valid_after_utc == AT + AUTHORITY_LIFE
    found = {extension.oid: extension for extension in made.extensions}
    basic = found[x509.BasicConstraints.oid]
    assert (basic.critical, basic.value) == (True, x509.BasicConstraints(True, 0))
    uses = found[x509.KeyUsage.oid].value
    assert uses == x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    names = found[x509.SubjectAlternativeName.oid].value
    assert list(names) == [x509.UniformResourceIdentifier("spiffe://hospital.example")]
    assert "Private" not in repr(PKI.authority)


def test_a_leaf_has_the_names_that_were_given_and_no_longer_life_than_its_ca() -> None:
    names = [URI, x509.DNSName("site-a.example")]
    leaf = PKI.authority.issue(KEY.public_key(), names, AT)
    found = {extension.oid: extension for extension in leaf.extensions}
    assert list(found[x509.SubjectAlternativeName.oid].value) == names
    assert found[x509.SubjectAlternativeName.oid].critical  # the subject is empty
    assert found[x509.BasicConstraints.oid].value == x509.BasicConstraints(False, None)
    assert leaf.not_valid_after_utc == AT + CERTIFICATE_LIFE
    late = PKI.authority.issue(KEY.public_key(), names, AT + AUTHORITY_LIFE - timedelta(days=1))
    assert late.not_valid_after_utc == PKI.authority.certificate.not_valid_after_utc


def test_serial_numbers_are_random() -> None:
    numbers = {PKI.credentials("site").certificate.serial_number for _ in range(8)}
    assert len(numbers) == 8
    assert max(numbers).bit_length() > 128  # false alarm: 8 numbers below 2**128 of 2**159


def test_the_list_holds_who_was_revoked_and_when() -> None:
    revoked = {1: AT - timedelta(days=1), 2: AT}
    crl = PKI.authority.list_revoked(revoked.items(), 7, AT)
    assert {entry.serial_number: entry.revocation_date_utc for entry in crl} == revoked
    assert crl.next_update_utc == AT + CRL_LIFE
    assert crl.last_update_utc == AT - CLOCK_SKEW
    assert crl.extensions.get_extension_for_class(x509.CRLNumber).value == x509.CRLNumber(7)
    assert crl.is_signature_valid(PKI.authority.key.public_key())


def test_a_request_for_ones_own_names_is_good() -> None:
    for pem in (request(KEY, SITE), asked(), asked(alternative(URI))):
        assert check_request(pem, SITE.names(())) == KEY.public_key()
    both = asked(alternative(URI, x509.DNSName("site-a.example")))
    assert check_request(both, SITE.names(["site-a.example"])) == KEY.public_key()


@pytest.mark.parametrize(
    "pem",
    [
        asked(alternative(x509.UniformResourceIdentifier("spiffe://hospital.example/party/b"))),
        asked(alternative(x509.UniformResourceIdentifier("spiffe://hospital.example/authority"))),
        asked(alternative(URI, x509.DNSName("ca.hospital.example"))),
        asked(alternative(URI, URI, x509.RFC822Name("a@hospital.example"))),
        asked((x509.BasicConstraints(ca=True, path_length=None), True), alternative(URI)),
        asked(alternative(URI), (x509.ExtendedKeyUsage([x509.ObjectIdentifier("1.2.3")]), False)),
    ],
)
def test_a_request_for_more_is_refused(pem: bytes) -> None:
    with pytest.raises(CertificateRefused, match="more than this party's own names"):
        check_request(pem, SITE.names(()))


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP256K1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
    ],
)
def test_a_key_of_another_kind_is_refused(key: object) -> None:
    with pytest.raises(CertificateRefused, match="not ECDSA P-256"):
        check_request(asked(alternative(URI), key=key), SITE.names(()))


def test_a_request_with_somebody_elses_key_is_refused() -> None:
    der = bytearray(REQUEST)
    der[-1] ^= 1  # the signature's last byte
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(Encoding.PEM)
    with pytest.raises(CertificateRefused, match="not signed by its own key"):
        check_request(forged, SITE.names(()))


@given(st.binary(max_size=600))
def test_garbage_is_no_request(garbage: bytes) -> None:
    for pem in (garbage, _armour(garbage)):
        with pytest.raises(CertificateRefused):
            check_request(pem, SITE.names(()))


@given(st.integers(0, len(REQUEST) - 1), st.integers(1, 255))
def test_a_request_of_which_a_byte_was_changed_is_refused(place: int, flips: int) -> None:
    der = bytearray(REQUEST)
    der[place] ^= flips
    with pytest.raises(CertificateRefused):
        check_request(_armour(bytes(der)), SITE.names(()))


def _armour(der: bytes) -> bytes:
    import base64

    body = base64.encodebytes(der)
    return b"-----BEGIN CERTIFICATE REQUEST-----\n" + body + b"-----END CERTIFICATE REQUEST-----\n"
