"""DSSE envelopes: the specification's example, and securesystemslib as the other side."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, SSlibKey

from llmos.crypto.dsse import IN_TOTO, open_envelope, pae, sign
from llmos.crypto.notes import NoteKey
from llmos.errors import VerificationFailed

KEY = NoteKey("llmos.local/0123/certificates", bytes(range(32)))
OTHER = NoteKey("elsewhere", bytes(32))
PAYLOAD = b'{"_type":"https://in-toto.io/Statement/v1"}'
PUBLIC_KEY = SSlibKey.from_crypto(
    Ed25519PrivateKey.from_private_bytes(KEY.seed).public_key(), keyid=KEY.key_id.hex()
)


def test_pae_of_the_specification() -> None:
    expected = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert pae("http://example.com/HelloWorld", b"hello world") == expected
    assert pae("é", b"") == b"DSSEv1 2 \xc3\xa9 0 "


@given(st.binary(max_size=100))
def test_securesystemslib_verifies_what_we_sign(payload: bytes) -> None:
    envelope = sign(payload, IN_TOTO, KEY)
    theirs = Envelope.from_dict(copy.deepcopy(envelope))
    assert theirs.payload == payload
    assert list(theirs.verify([PUBLIC_KEY], 1)) == [KEY.key_id.hex()]
    theirs.payload += b" "
    with pytest.raises(VerificationError):
        theirs.verify([PUBLIC_KEY], 1)
    assert open_envelope(envelope, KEY.verifier) == payload


def test_we_verify_what_securesystemslib_signs() -> None:
    theirs = Envelope(PAYLOAD, IN_TOTO, {})
    theirs.sign(CryptoSigner(Ed25519PrivateKey.from_private_bytes(KEY.seed), PUBLIC_KEY))
    assert open_envelope(theirs.to_dict(), KEY.verifier) == PAYLOAD


def test_other_signatures_are_ignored() -> None:
    envelope = sign(PAYLOAD, IN_TOTO, OTHER)
    envelope["signatures"] += sign(PAYLOAD, IN_TOTO, KEY)["signatures"]
    assert open_envelope(envelope, KEY.verifier) == PAYLOAD


def changed(**fields: Any) -> dict[str, Any]:
    return sign(PAYLOAD, IN_TOTO, KEY) | fields


def signature(**fields: Any) -> list[dict[str, Any]]:
    return [sign(PAYLOAD, IN_TOTO, KEY)["signatures"][0] | fields]


@pytest.mark.parametrize(
    ("envelope", "message"),
    [
        ({}, "not a DSSE envelope"),
        (changed(payload=7), "not a DSSE envelope"),
        (changed(payloadType=None), "not a DSSE envelope"),
        (changed(signatures={}), "not a DSSE envelope"),
        (changed(payload="e30"), "base64"),
        (changed(payload="e30="), "not signed by"),
        (changed(payloadType="text/plain"), "holds 'text/plain'"),
        (changed(signatures=[]), "not signed by"),
        (changed(signatures=["x"]), "malformed signature"),
        (changed(signatures=signature(sig=1)), "malformed signature"),
        (changed(signatures=signature(sig="AAAA")), "not signed by"),
        (changed(signatures=signature(keyid="00000000")), "not signed by"),
        (changed(signatures=[{"keyid": "", "sig": ""}] * 101), "too many"),
        (sign(PAYLOAD, IN_TOTO, OTHER), "not signed by"),
    ],
)
def test_everything_else_is_refused(envelope: dict[str, Any], message: str) -> None:
    with pytest.raises(VerificationFailed, match=message):
        open_envelope(envelope, KEY.verifier)


def test_the_type_is_signed_too() -> None:
    envelope = sign(PAYLOAD, "text/plain", KEY)
    assert open_envelope(envelope, KEY.verifier, payload_type="text/plain") == PAYLOAD
    envelope["payloadType"] = IN_TOTO
    with pytest.raises(VerificationFailed, match="not signed by"):
        open_envelope(envelope, KEY.verifier)


@given(st.integers(min_value=0))
def test_every_flipped_bit_is_refused(position: int) -> None:
    envelope = sign(PAYLOAD, IN_TOTO, KEY)
    data = bytearray(envelope["payload"].encode() + envelope["signatures"][0]["sig"].encode())
    bit = position % (8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    text, size = data.decode("latin-1"), len(envelope["payload"])
    envelope["payload"], envelope["signatures"][0]["sig"] = text[:size], text[size:]
    with pytest.raises(VerificationFailed):
        open_envelope(envelope, KEY.verifier)
