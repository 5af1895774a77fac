"""DSSE v1: a JSON envelope that signs a payload together with its type.

Specification: https://github.com/secure-systems-lab/dsse, version 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from llmos.crypto.notes import NoteKey, Verifier, decode_base64, encode_base64
from llmos.errors import VerificationFailed

IN_TOTO: Final = "application/vnd.in-toto+json"
_MAX_SIGNATURES: Final = 100


def pae(payload_type: str, payload: bytes) -> bytes:
    """Return the pre-authentication encoding: what is signed.

    >>> pae("http://example.com/HelloWorld", b"hello world")
    b'DSSEv1 29 http://example.com/HelloWorld 11 hello world'
    """
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def sign(payload: bytes, payload_type: str, key: NoteKey) -> dict[str, Any]:
    """Return an envelope with one signature; `keyid` is the note key's id in hex."""
    signature = key.sign(pae(payload_type, payload))
    return {
        "payload": encode_base64(payload),
        "payloadType": payload_type,
        "signatures": [{"keyid": key.key_id.hex(), "sig": encode_base64(signature)}],
    }


def open_envelope(
    envelope: Mapping[str, Any], verifier: Verifier, *, payload_type: str = IN_TOTO
) -> bytes:
    """Return the payload of an envelope that `verifier` signed; other keys are ignored.

    Raises:
        VerificationFailed: malformed, of another type, not signed by this key, or wrongly.
    """
    match envelope:
        case {"payload": str(encoded), "payloadType": str(kind), "signatures": list(signatures)}:
            payload = decode_base64(encoded)
        case _:
            raise VerificationFailed("this is not a DSSE envelope")
    if kind != payload_type:
        raise VerificationFailed(f"the envelope holds {kind!r}, not {payload_type!r}")
    if len(signatures) > _MAX_SIGNATURES:
        raise VerificationFailed("the envelope has too many signatures")
    message = pae(kind, payload)
    for signature in signatures:
        match signature:
            case {"keyid": str(key_id), "sig": str(sig)}:
                if key_id == verifier.key_id.hex() and verifier.verify(decode_base64(sig), message):
                    return payload
            case _:
                raise VerificationFailed("the envelope has a malformed signature")
    raise VerificationFailed(
        f"the envelope is not signed by {verifier.name}",
        hint="check that the public key belongs to the home that made it",
    )
