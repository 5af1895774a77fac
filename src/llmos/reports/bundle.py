"""The certificate file taken apart: one canonical spelling, and nothing in it that is not ours."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import rfc8785

from llmos.errors import VerificationFailed
from llmos.reports.certificate import (
    MEDIA_TYPE,
    MEDIA_TYPE_1,
    PREDICATE_TYPE,
    PREDICATE_TYPE_1,
)
from llmos.transparency.proofs import LogProof

LARGEST_FILE_BYTES: Final = 1 << 20
_PREDICATE_TYPES: Final = {MEDIA_TYPE: PREDICATE_TYPE, MEDIA_TYPE_1: PREDICATE_TYPE_1}


@dataclass(frozen=True, slots=True)
class CertificateFile:
    """A certificate file taken apart; nothing of it is checked yet."""

    predicate_type: str
    envelope: Mapping[str, Any]
    proof: LogProof
    records: Mapping[str, LogProof] | None  # None in version 1


def open_file(data: bytes) -> CertificateFile:
    """Take the file apart; what is not signed or proven may not be in it."""
    fields = read_json(data, "the certificate")
    media_type = fields.get("mediaType")
    if not isinstance(media_type, str) or media_type not in _PREDICATE_TYPES:
        raise VerificationFailed(f"this is not a privacy certificate but {media_type!r}")
    ours = {"mediaType", "envelope", "log_proof"}
    if set(fields) != (ours if media_type == MEDIA_TYPE_1 else ours | {"records"}):
        raise VerificationFailed(f"the certificate has other fields than ours: {sorted(fields)}")
    match fields["envelope"]:
        case {
            "payload": str(),
            "payloadType": str(),
            "signatures": [{"keyid": str(), "sig": str(), **signature_rest}],
            **envelope_rest,
        } if not signature_rest and not envelope_rest:
            envelope: dict[str, Any] = fields["envelope"]
        case _:
            raise VerificationFailed("the certificate's envelope has fields that are not ours")
    proof = read_proof(fields["log_proof"])
    records = None if media_type == MEDIA_TYPE_1 else _read_records(fields["records"])
    return CertificateFile(_PREDICATE_TYPES[media_type], envelope, proof, records)


def _read_records(fields: object) -> dict[str, LogProof]:
    if not isinstance(fields, dict):
        raise VerificationFailed("the certificate has no proofs of its records")
    return {name: read_proof(proof) for name, proof in fields.items()}


def read_proof(fields: object) -> LogProof:
    """Read a log proof that has our fields and no others.

    Raises:
        VerificationFailed: it has not.
    """
    if not isinstance(fields, dict):
        raise VerificationFailed("the certificate has no log proof")
    proof = LogProof.from_dict(fields)
    if proof.to_dict() != fields:
        raise VerificationFailed("the log proof has fields that are not ours")
    return proof


def read_json(data: bytes, what: str, largest: int = LARGEST_FILE_BYTES) -> dict[str, Any]:
    """Read an object that is spelt canonically (RFC 8785), so that every byte of it matters.

    Raises:
        VerificationFailed: it is none, or has more than `largest` bytes.
    """
    if len(data) > largest:
        raise VerificationFailed(f"{what} is larger than {largest} bytes")
    try:
        value = json.loads(data, object_pairs_hook=_unique)
        canonical = rfc8785.dumps(value)
    except (ValueError, RecursionError) as error:  # also bad UTF-8, NaN and numbers out of range
        raise VerificationFailed(f"{what} is not JSON that can be read") from error
    if canonical != data:
        raise VerificationFailed(f"{what} is not in canonical form; some byte was changed")
    if not isinstance(value, dict):
        raise VerificationFailed(f"{what} is not a JSON object")
    return value


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise VerificationFailed(f"the field {name!r} is there twice")
        fields[name] = value
    return fields
