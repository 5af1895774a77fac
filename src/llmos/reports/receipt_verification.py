"""Offline verification of an erasure receipt: needs the file and two public keys, nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from llmos.crypto import dsse
from llmos.errors import VerificationFailed
from llmos.reports import erasure_receipt
from llmos.reports.bundle import read_json, read_proof
from llmos.reports.certificate import STATEMENT_TYPE
from llmos.transparency.proofs import LogProof, verify_proof
from llmos.transparency.public_keys import read_public_keys


def verify_receipt(data: bytes, public_keys: str) -> dict[str, Any]:
    """Check a receipt file: form, signature, log proof, and that it says what it does not do.

    Raises:
        VerificationFailed: a check failed; the message says which.
    """
    certificate_key, log_key = read_public_keys(public_keys)
    envelope, proof = _open_file(data)
    payload = dsse.open_envelope(envelope, certificate_key)
    entry = verify_proof(proof, log_key)
    statement = read_json(payload, "the signed statement")
    try:
        predicate = statement["predicate"]
        _check(statement, predicate, entry, payload)
        if predicate["issuer"] != certificate_key.name:
            raise VerificationFailed(f"the receipt names another issuer: {predicate['issuer']!r}")
        return _summary(predicate, log_key.name, proof)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise VerificationFailed(
            f"the signed statement lacks or misuses a field: {error}"
        ) from error


def _open_file(data: bytes) -> tuple[dict[str, Any], LogProof]:
    """Take the file apart; what is not signed or proven may not be in it."""
    match read_json(data, "the receipt"):
        case {
            "mediaType": erasure_receipt.MEDIA_TYPE,
            "envelope": {
                "payload": str(payload),
                "payloadType": str(kind),
                "signatures": [{"keyid": str(key_id), "sig": str(sig), **in_signature}],
                **in_envelope,
            },
            "log_proof": dict() as proof,
            **in_file,
        } if not in_signature and not in_envelope and not in_file:
            signatures = [{"keyid": key_id, "sig": sig}]
            envelope = {"payload": payload, "payloadType": kind, "signatures": signatures}
            return envelope, read_proof(proof)
        case _:
            raise VerificationFailed("this is not an erasure receipt, or it has other fields too")


def _check(
    statement: Mapping[str, Any],
    predicate: Mapping[str, Any],
    entry: Mapping[str, Any],
    payload: bytes,
) -> None:
    types = (statement["_type"], statement["predicateType"])
    if types != (STATEMENT_TYPE, erasure_receipt.PREDICATE_TYPE):
        raise VerificationFailed("the signed statement is not an erasure receipt of version 1")
    match entry:
        case {"action": "erase-data", "outcome": "done", "details": {**details}} if (
            details.get(erasure_receipt.DIGEST_FIELD) == hashlib.sha256(payload).hexdigest()
        ):
            pass
        case _:
            raise VerificationFailed("the log entry is of something else than this receipt")
    if statement["subject"] != erasure_receipt.subjects(predicate["destroyed"]):
        raise VerificationFailed("the statement's subjects are not the keys that were destroyed")
    if predicate["not_done"] != list(erasure_receipt.NOT_DONE):
        raise VerificationFailed("the receipt does not say what an erasure leaves")
    for model in predicate["models"]:
        if model["guarantee"] is None and model["warning"] != erasure_receipt.UNBOUNDED:
            raise VerificationFailed(f"the receipt does not warn of the model {model['model']!r}")


def _summary(predicate: Mapping[str, Any], log: str, proof: LogProof) -> dict[str, Any]:
    """Return what a person or a program wants to see first."""
    decision, destroyed = predicate["decision"], predicate["destroyed"]
    return {
        "erased_from": [f"{key['dataset']}, {key['part']}" for key in destroyed],
        "units": [key["unit"] for key in destroyed],
        "keys_sha256": [key["key_sha256"] for key in destroyed],
        "approval": decision["approval"],
        "proposer": decision["proposer"],
        "decider": decision["decider"],
        "decided_at": decision["decided_at"],
        "decision_log_index": decision["log_index"],
        "issuer": predicate["issuer"],
        "issued_at": predicate["issued_at"],
        "models": [_bound(model) for model in predicate["models"]],
        "not_done": predicate["not_done"],
        "log": log,
        "log_index": proof.index,
        "log_size": proof.size,
    }


def _bound(model: Mapping[str, Any]) -> str:
    """Say what bounds that which stays of a person in a model."""
    bounds, certificate = model["guarantee"], model["certificate_sha256"]
    if bounds is None:
        return f"{model['model']}: WARNING: {model['warning']}"
    return (
        f"{model['model']}: epsilon {bounds['epsilon']:.4g} at delta {bounds['delta']:.4g} "
        f"per {bounds['unit']}"
        + (f", certificate {certificate}" if certificate else ", not certified")
    )
