"""What makes a certificate or a revocation list good; the handshakes are in test_tls."""

from __future__ import annotations

from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st
from tests.parties import NOW, Pki

from llmos.crypto.certificates import CLOCK_SKEW, CRL_LIFE, MALFORMED, PartyId
from llmos.errors import CertificateRefused
from llmos.parties.encoding import generate_key
from llmos.parties.peers import Anchor, check_crl, parse_id, verify

PKI = Pki()
ISSUER = PKI.authority.certificate
LEAF = PKI.credentials("site").certificate.public_bytes(Encoding.DER)


@pytest.mark.parametrize("party", [PartyId("a.example", "site"), PartyId("a.example", None)])
def test_an_id_is_read_as_it_is_written(party: PartyId) -> None:
    assert parse_id(party.uri) == party


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "spiffe://a.example",
        "spiffe://a.example/party/",
        "spiffe://a.example/party/Site",
        "spiffe://a.example/party/a/b",
        "spiffe://a.example/site",
        "spiffe://a.example/authority/",
        "spiffe://a.example:1/party/site",
        "spiffe://u@a.example/party/site",
        "SPIFFE://a.example/party/site",
        "a.example/party/site",
        "spiffe://a.example/party/site?x",
    ],
)
def test_what_is_no_id_is_refused(uri: str) -> None:
    with pytest.raises(CertificateRefused):
        parse_id(uri)


@pytest.mark.filterwarnings("ignore:Parsed a serial number which wasn't positive")
@given(st.integers(0, len(LEAF) - 1), st.integers(1, 255))
def test_a_certificate_of_which_a_byte_was_changed_is_refused(place: int, flips: int) -> None:
    der = bytearray(LEAF)
    der[place] ^= flips
    try:
        changed = x509.load_der_x509_certificate(bytes(der))
    except MALFORMED:
        return
    with pytest.raises(CertificateRefused):
        verify(changed, [PKI.anchor()], NOW)


def test_a_name_of_a_kind_that_nobody_reads_is_refused() -> None:
    der = bytearray(LEAF)
    name = der.index(b"\x86", der.index(bytes.fromhex("0603551d11")))  # [6] URI -> [5] EDIPartyName
    der[name] ^= 0x86 ^ 0xA5
    changed = x509.load_der_x509_certificate(bytes(der))
    with pytest.raises(CertificateRefused, match="names cannot be read"):
        verify(changed, [PKI.anchor()], NOW)


def test_a_certificate_has_one_form_only() -> None:
    # the bits that a signature leaves unused are counted outside of what is signed
    while True:
        party = PKI.credentials("site").certificate
        if party.signature[-1] % 2 == 0:
            break  # else the parser refuses it already
    der = bytearray(party.public_bytes(Encoding.DER))
    der[-len(party.signature) - 1] = 1
    changed = x509.load_der_x509_certificate(bytes(der))
    assert changed.tbs_certificate_bytes == party.tbs_certificate_bytes
    with pytest.raises(CertificateRefused, match="canonical"):
        verify(changed, [PKI.anchor()], NOW)


def test_a_certificate_without_names_is_refused() -> None:
    with pytest.raises(CertificateRefused, match="0 URIs"):
        verify(Pki().authority.issue(generate_key().public_key(), [], NOW), [], NOW)
    bare = x509.CertificateBuilder(ISSUER.subject, x509.Name([]), generate_key().public_key(), 1)
    bare = bare.not_valid_before(NOW).not_valid_after(NOW + timedelta(days=1))
    with pytest.raises(CertificateRefused, match="names cannot be read"):
        verify(bare.sign(PKI.authority.key, SHA256()), [PKI.anchor()], NOW)


def test_an_intermediate_of_a_trusted_ca_is_no_issuer() -> None:
    party = PKI.credentials("site")  # a leaf's key signs another leaf
    forged = (
        x509.CertificateBuilder(
            party.certificate.subject, x509.Name([]), generate_key().public_key(), 1
        )
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(PKI.id("other").names(())), critical=True)
        .sign(party.key, SHA256())
    )
    with pytest.raises(CertificateRefused, match="no good"):
        verify(forged, [PKI.anchor()], NOW)


def built(
    issuer: x509.Name = ISSUER.subject, *, critical: bool = False, number: bool = True
) -> x509.CertificateRevocationList:
    builder = x509.CertificateRevocationListBuilder(issuer).last_update(NOW - CLOCK_SKEW)
    builder = builder.next_update(NOW + CRL_LIFE)
    if number:
        builder = builder.add_extension(x509.CRLNumber(3), critical=critical)
    return builder.sign(PKI.authority.key, SHA256())


def test_a_list_is_good_from_its_time_to_its_end() -> None:
    crl = PKI.crl(number=3)
    assert check_crl(crl, ISSUER, NOW) == 3
    start, end = crl.last_update_utc, crl.next_update_utc
    assert end is not None
    assert check_crl(crl, ISSUER, start) == 3
    for at in (start - timedelta(seconds=1), end):
        with pytest.raises(CertificateRefused, match="not valid at this time"):
            check_crl(crl, ISSUER, at)


@pytest.mark.parametrize(
    ("crl", "says"),
    [
        (Pki().crl(), "not a complete one of this CA"),  # the same name, another key
        (Pki("b.example").crl(), "not a complete one of this CA"),
        (built(x509.Name([])), "not a complete one of this CA"),
        (built(critical=True), "not a complete one of this CA"),
        (built(number=False), "cannot be used"),
    ],
)
def test_a_list_is_refused(crl: x509.CertificateRevocationList, says: str) -> None:
    with pytest.raises(CertificateRefused, match=says):
        check_crl(crl, ISSUER, NOW)


def test_an_anchor_is_read_as_it_is_written() -> None:
    anchor = PKI.anchor()
    assert Anchor.parse("hospital.example", anchor.pem) == anchor


@pytest.mark.parametrize(
    "pem",
    [
        b"",
        b"nothing",
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        PKI.anchor().pem.replace(b"-----BEGIN X509 CRL-----\n", b"-----BEGIN X509 CRL-----\nAAAA"),
    ],
)
def test_a_bundle_that_cannot_be_read_is_refused(pem: bytes) -> None:
    with pytest.raises(CertificateRefused, match="cannot be read"):
        Anchor.parse("hospital.example", pem)
