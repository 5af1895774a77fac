"""Signatures by the keys of parties' certificates, and whose certificates are believed."""

from __future__ import annotations

from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519
from tests.parties import NOW, Pki

from llmos.crypto.certificates import CERTIFICATE_LIFE
from llmos.errors import CertificateRefused
from llmos.parties import signatures
from llmos.parties.encoding import to_pem

PKI = Pki()
NORTH, SOUTH = PKI.credentials("north"), PKI.credentials("south")
URI = PKI.id("north").uri
MESSAGE = b"these are my keys"


def test_a_signature_counts_for_its_party_and_message_only() -> None:
    shown = {URI: to_pem(NORTH.certificate), PKI.id("south").uri: to_pem(SOUTH.certificate)}
    verified = signatures.verifier(shown, [PKI.anchor()], NOW)
    signature = signatures.sign(NORTH.key, MESSAGE)
    assert verified(URI, MESSAGE, signature)
    assert not verified(URI, MESSAGE + b"!", signature)
    assert not verified(PKI.id("south").uri, MESSAGE, signature)
    assert not verified(PKI.id("nobody").uri, MESSAGE, signature)
    assert not verified(URI, MESSAGE, b"no signature")


def refuse(uri: str, pem: str, anchor: object = None) -> str:
    with pytest.raises(CertificateRefused) as refused:
        signatures.verifier({uri: pem}, [anchor or PKI.anchor()], NOW)  # type: ignore[list-item]
    return refused.value.message


def test_a_certificate_is_believed_as_in_a_handshake() -> None:
    pem = to_pem(NORTH.certificate)
    assert "another party" in refuse(PKI.id("south").uri, pem)
    assert "cannot be read" in refuse(URI, pem.replace("M", "?"))
    assert "was revoked" in refuse(URI, pem, PKI.anchor(NORTH))
    assert "is no good" in refuse(URI, pem, Pki().anchor())  # a CA of the same name
    old = PKI.credentials("north", at=NOW - 2 * CERTIFICATE_LIFE)
    assert "is no good" in refuse(URI, to_pem(old.certificate))


def test_a_list_of_another_ca_revokes_nothing_here() -> None:
    other = Pki("clinic.example")
    revoked = other.anchor(NORTH)  # the same serial number on the list of another issuer
    verified = signatures.verifier({URI: to_pem(NORTH.certificate)}, [revoked, PKI.anchor()], NOW)
    assert verified(URI, MESSAGE, signatures.sign(NORTH.key, MESSAGE))


def test_what_was_signed_before_a_revocation_stays_signed() -> None:
    second = timedelta(seconds=1)
    shown = {URI: to_pem(NORTH.certificate)}
    signature = signatures.sign(NORTH.key, MESSAGE)
    revoked = PKI.anchor(NORTH, at=NOW + second)
    assert signatures.verifier(shown, [revoked], NOW)(URI, MESSAGE, signature)
    with pytest.raises(CertificateRefused, match="was revoked"):
        signatures.verifier(shown, [revoked], NOW + second)


def test_keys_that_parties_do_not_have_are_refused() -> None:
    key = ed25519.Ed25519PrivateKey.generate().public_key()
    names = [x509.UniformResourceIdentifier(URI)]
    issued = PKI.authority.issue(key, names, NOW)  # type: ignore[arg-type]
    message = refuse(URI, to_pem(issued))
    assert "no ECDSA key" in message or "is no good" in message
