"""Cosignatures: a witness's timestamped Ed25519 signature over someone else's checkpoint.

Specification: https://c2sp.org/tlog-cosignature (signature type 0x04). Its message begins with
`cosignature/v1`, which is no origin of a log, and its key id is not that of a note's signature: so
a home signs its own checkpoints and cosigns those of others with one key.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Final

from llmos.crypto.notes import NoteKey, Verifier, encode_base64, parse_signature_line
from llmos.errors import VerificationFailed

_COSIGNATURE_V1: Final = b"\x04"
_LATEST_S: Final = 2**63 - 1
_BLOB: Final = struct.Struct(">4sQ64s")  # key id, POSIX time, Ed25519 signature


def cosign(text: str, key: NoteKey, time_s: int) -> str:
    """Return the signature line, with its newline, over a checkpoint's text at a POSIX time."""
    signature = key.sign(_message(text, time_s))
    blob = _BLOB.pack(cosigner_id(key.verifier), time_s, signature)
    return f"— {key.name} {encode_base64(blob)}\n"


def verify_cosignature(line: str, text: str, cosigner: Verifier) -> int:
    """Return the POSIX time at which `cosigner` signed the checkpoint's text.

    Raises:
        VerificationFailed: the line is malformed, of another key, or its signature is wrong.
    """
    name, blob = parse_signature_line(line.removesuffix("\n"))
    if len(blob) != _BLOB.size:
        raise VerificationFailed("this is not an Ed25519 cosignature")
    key_id, time_s, signature = _BLOB.unpack(blob)
    if (name, key_id) != (cosigner.name, cosigner_id(cosigner)):
        raise VerificationFailed(f"the cosignature is not of {cosigner.name}")
    if time_s > _LATEST_S or not cosigner.verify(signature, _message(text, time_s)):
        raise VerificationFailed(f"the cosignature of {name} is wrong")
    return int(time_s)


def cosigner_id(cosigner: Verifier) -> bytes:
    """Return the four bytes that name a cosigner's key; those of its notes are others."""
    encoded = cosigner.name.encode() + b"\n" + _COSIGNATURE_V1 + cosigner.public_key
    return hashlib.sha256(encoded).digest()[:4]


def _message(text: str, time_s: int) -> bytes:
    return f"cosignature/v1\ntime {time_s}\n{text}".encode()
