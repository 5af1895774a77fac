"""Organisations with a CA of their own."""

from __future__ import annotations

from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from tests.parties import NOW, Pki

from llmos.crypto.certificates import CRL_LIFE
from llmos.errors import CertificateRefused, ConfigError, PartyExists, UnknownParty
from llmos.kernel.kernel import Kernel
from llmos.parties import trust
from llmos.parties.authority import PartyAuthority
from llmos.parties.encoding import generate_key
from llmos.parties.peers import Anchor, verify

BANK = Pki("bank.example")


def add(kernel: Kernel, pem: bytes, organisation: str = "bank.example") -> Anchor:
    return trust.add(organisation, pem, kernel.principal(), kernel, NOW)


def bundle(*revoked: object, number: int = 1) -> bytes:
    crl = BANK.crl(*revoked, number=number)  # type: ignore[arg-type]
    return Anchor("", (BANK.authority.certificate,), (crl,)).pem


def with_usage(*, ca: bool = True, crl_sign: bool = True, bare: bool = False) -> bytes:
    key, name = generate_key(), x509.Name.from_rfc4514_string("CN=other")
    built = x509.CertificateBuilder(name, name, key.public_key(), 1)
    built = built.not_valid_before(NOW).not_valid_after(NOW + timedelta(days=1))
    if not bare:
        uses = x509.KeyUsage(False, False, False, False, False, True, crl_sign, False, False)
        built = built.add_extension(x509.BasicConstraints(ca, None), critical=True)
        built = built.add_extension(uses, critical=True)
    return built.sign(key, SHA256()).public_bytes(Encoding.PEM)


def test_a_trusted_organisations_party_is_believed_for_that_organisation_only(
    kernel: Kernel,
) -> None:
    assert trust.anchors(kernel) == ()
    assert add(kernel, bundle()).organisation == "bank.example"
    anchors = trust.anchors(kernel)
    assert [anchor.organisation for anchor in anchors] == ["bank.example"]
    site = BANK.credentials("site").certificate
    assert verify(site, anchors, NOW).organisation == "bank.example"
    claims = BANK.credentials("", names=Pki().id("site").names(())).certificate
    with pytest.raises(CertificateRefused, match=r"hospital\.example is not trusted"):
        verify(claims, anchors, NOW)
    trust.remove("bank.example", kernel.principal(), kernel)
    with pytest.raises(CertificateRefused, match=r"bank\.example is not trusted"):
        verify(site, trust.anchors(kernel), NOW)
    with pytest.raises(UnknownParty):
        trust.remove("bank.example", kernel.principal(), kernel)


def test_adding_again_replaces_the_list_by_a_newer_one_only(kernel: Kernel) -> None:
    add(kernel, bundle(number=2))
    gone = BANK.credentials("site")
    add(kernel, bundle(gone, number=3))
    (anchor,) = trust.trusted(kernel)
    serial = gone.certificate.serial_number
    assert anchor.crls[0].get_revoked_certificate_by_serial_number(serial) is not None
    with pytest.raises(CertificateRefused, match="older"):
        add(kernel, bundle(number=2))
    with pytest.raises(PartyExists, match="other certificates"):
        add(kernel, Pki("bank.example").anchor().pem)
    assert trust.trusted(kernel) == [anchor]


def test_lists_are_kept_in_the_order_of_their_issuers(kernel: Kernel) -> None:
    other = Pki("other.example")
    mixed = Anchor(
        "",
        (BANK.authority.certificate, other.authority.certificate),
        (other.crl(number=5), BANK.crl(number=1)),
    )
    anchor = add(kernel, mixed.pem)
    assert [crl.issuer for crl in anchor.crls] == [issuer.subject for issuer in anchor.issuers]
    assert add(kernel, mixed.pem) == anchor


@pytest.mark.parametrize(
    ("pem", "says"),
    [
        (b"nothing", "cannot be read"),
        (BANK.authority.certificate.public_bytes(Encoding.PEM), "one revocation list for each"),
        (BANK.anchor(at=NOW - CRL_LIFE).pem, "not valid at this time"),
        (Anchor("", BANK.anchor().issuers, (Pki("bank.example").crl(),)).pem, "not a complete"),
        (Anchor("", BANK.anchor().issuers, (BANK.crl(), Pki().crl())).pem, "one revocation list"),
        (with_usage(bare=True), "not of a CA"),
        (with_usage(ca=False), "signs certificates and lists"),
        (with_usage(crl_sign=False), "signs certificates and lists"),
        (Anchor("", (BANK.credentials("x").certificate,), (BANK.crl(),)).pem, "signs certificates"),
    ],
)
def test_a_bundle_is_refused(kernel: Kernel, pem: bytes, says: str) -> None:
    with pytest.raises(CertificateRefused, match=says):
        add(kernel, pem)
    assert trust.trusted(kernel) == []


def test_an_organisation_that_is_known_otherwise_is_refused(ca: PartyAuthority) -> None:
    with pytest.raises(PartyExists, match="this home's CA"):
        add(ca.kernel, Pki().anchor().pem, "hospital.example")
    with pytest.raises(ConfigError):
        add(ca.kernel, bundle(), "Bank Example")
    assert trust.trusted(ca.kernel) == []
