"""Offline verification of a certificate: needs the file and two public keys, and nothing else."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import rfc8785

from llmos.crypto import dsse
from llmos.errors import LlmosError, VerificationFailed
from llmos.kernel import accounting
from llmos.privacy import (
    Mechanism,
    Neighboring,
    PrivacyLoss,
    PrivacyUnit,
    mechanism_from_dict,
)
from llmos.reports.certificate import DIGEST_FIELD, MEDIA_TYPE, PREDICATE_TYPE, STATEMENT_TYPE
from llmos.transparency.proofs import LogProof, verify_proof
from llmos.transparency.public_keys import read_public_keys

LARGEST_FILE_BYTES: Final = 1 << 20
EPSILON_TOLERANCE: Final = 1e-3  # relative; between what is printed and what is derived again


@dataclass(frozen=True, slots=True)
class VerifiedCertificate:
    """A certificate after every check; nothing else in the house builds one."""

    model: str
    digest: str  # SHA-256 of the model's files, hex, as certified
    model_checked: bool  # whether the files at hand were compared with it
    issuer: str
    issued_at: str
    loss: PrivacyLoss  # epsilon as printed
    derived_epsilon: float  # from the mechanism, by the verifier's own accountant
    mechanism: Mechanism
    production: bool
    log: str
    log_index: int
    log_size: int
    statement: Mapping[str, Any]

    @property
    def predicate(self) -> Mapping[str, Any]:
        """The certificate's sections."""
        predicate: Mapping[str, Any] = self.statement["predicate"]
        return predicate

    def summary(self) -> dict[str, str | int | float | bool]:
        """Return what a person or a program wants to see first."""
        return {
            "model": self.model,
            "sha256": self.digest,
            "model_files": "match" if self.model_checked else "not compared",
            "epsilon": self.loss.epsilon,
            "epsilon_derived": self.derived_epsilon,
            "delta": self.loss.delta,
            "unit": self.loss.unit.column,
            "neighboring": str(self.loss.neighboring),
            "production": self.production,
            "issuer": self.issuer,
            "issued_at": self.issued_at,
            "log": self.log,
            "log_index": self.log_index,
            "log_size": self.log_size,
        }


def verify_bundle(
    data: bytes, public_keys: str, *, model_digest: str | None = None
) -> VerifiedCertificate:
    """Check a certificate file: form, signature, log proof, and the epsilon derived anew.

    Args:
        data: the file; only the one canonical spelling of its JSON is accepted.
        public_keys: the two lines of `home.pub`, certificate key first.
        model_digest: SHA-256 of the model's files at hand, hex, to compare with the certified one.

    Raises:
        VerificationFailed: a check failed; the message says which.
    """
    certificate_key, log_key = read_public_keys(public_keys)
    envelope, proof = _open_file(data)
    payload = dsse.open_envelope(envelope, certificate_key, payload_type=dsse.IN_TOTO)
    entry = verify_proof(proof, log_key)
    _check_entry(entry, payload)
    statement = _read_json(payload, "the signed statement")
    verified = _read_statement(statement, proof, log_key.name, model_digest)
    if verified.issuer != certificate_key.name:
        raise VerificationFailed(f"the certificate names another issuer: {verified.issuer!r}")
    return verified


def verify_log_proof(data: bytes, public_keys: str) -> dict[str, Any]:
    """Check the file that `llmos log prove` writes and return the proven entry with its place.

    Raises:
        VerificationFailed: a check failed; the message says which.
    """
    _, log_key = read_public_keys(public_keys)
    proof = _read_proof(_read_json(data, "the log proof"))
    entry = verify_proof(proof, log_key)
    return {"log": log_key.name, "log_index": proof.index, "log_size": proof.size, "entry": entry}


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise VerificationFailed(f"the field {name!r} is there twice")
        fields[name] = value
    return fields


def _read_json(data: bytes, what: str) -> dict[str, Any]:
    """Read an object that is spelt canonically (RFC 8785), so that every byte of it matters."""
    if len(data) > LARGEST_FILE_BYTES:
        raise VerificationFailed(f"{what} is larger than {LARGEST_FILE_BYTES} bytes")
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


def _open_file(data: bytes) -> tuple[dict[str, Any], LogProof]:
    """Take the file apart; what is not signed or proven may not be in it."""
    fields = _read_json(data, "the certificate")
    if set(fields) != {"mediaType", "envelope", "log_proof"}:
        raise VerificationFailed(f"the certificate has other fields than ours: {sorted(fields)}")
    if fields["mediaType"] != MEDIA_TYPE:
        raise VerificationFailed(f"this is not a privacy certificate but {fields['mediaType']!r}")
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
    if not isinstance(fields["log_proof"], dict):
        raise VerificationFailed("the certificate has no log proof")
    return envelope, _read_proof(fields["log_proof"])


def _read_proof(fields: Mapping[str, Any]) -> LogProof:
    proof = LogProof.from_dict(fields)
    if proof.to_dict() != fields:
        raise VerificationFailed("the log proof has fields that are not ours")
    return proof


def _check_entry(entry: Any, payload: bytes) -> None:  # noqa: ANN401 - any JSON value may come
    expected = hashlib.sha256(payload).hexdigest()
    match entry:
        case {"action": "report", "outcome": "done", "details": {**details}} if (
            details.get(DIGEST_FIELD) == expected
        ):
            return
        case _:
            raise VerificationFailed("the log entry is of something else than this certificate")


def _read_statement(
    statement: Mapping[str, Any], proof: LogProof, log: str, model_digest: str | None
) -> VerifiedCertificate:
    if (statement.get("_type"), statement.get("predicateType")) != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise VerificationFailed("the signed statement is not a privacy certificate of version 1")
    try:
        (subject,) = statement["subject"]
        predicate = statement["predicate"]
        guarantee = predicate["guarantee"]
        loss = PrivacyLoss(
            epsilon=float(guarantee["epsilon"]),
            delta=float(guarantee["delta"]),
            unit=PrivacyUnit(guarantee["unit"]),
            neighboring=Neighboring(guarantee["neighboring"]),
        )
        mechanism = mechanism_from_dict(predicate["algorithm"]["mechanism"])
        verified = VerifiedCertificate(
            model=subject["name"],
            digest=subject["digest"]["sha256"],
            model_checked=model_digest is not None,
            issuer=predicate["issuer"],
            issued_at=predicate["issued_at"],
            loss=loss,
            derived_epsilon=accounting.epsilon(mechanism, loss.delta, loss.neighboring),
            mechanism=mechanism,
            production=predicate["implementation"]["production"],
            log=log,
            log_index=proof.index,
            log_size=proof.size,
            statement=statement,
        )
        measured = predicate["measured_leakage"]
        bound = None if measured is None else measured["epsilon_lower_bound"]
        lower = 0.0 if bound is None else float(bound["lower"])
    except (KeyError, TypeError, ValueError, AttributeError, LlmosError) as error:
        raise VerificationFailed(
            f"the signed statement lacks or misuses a field: {error}"
        ) from error
    _check_figures(verified, lower, model_digest)
    return verified


def _check_figures(verified: VerifiedCertificate, lower: float, model_digest: str | None) -> None:
    """Hold the printed figures against what follows from the mechanism and from the model."""
    printed, derived = verified.loss.epsilon, verified.derived_epsilon
    if not math.isclose(printed, derived, rel_tol=EPSILON_TOLERANCE, abs_tol=1e-12):
        raise VerificationFailed(
            f"the certificate says epsilon {printed:.6g}, but its mechanism gives {derived:.6g}"
        )
    if lower > printed:
        raise VerificationFailed(
            f"the certificate's own measurement, at least {lower:.4g}, refutes its epsilon"
        )
    if model_digest is not None and model_digest != verified.digest:
        raise VerificationFailed(
            f"the model at hand has SHA-256 {model_digest}, the certified one {verified.digest}",
            hint="the certificate belongs to another model, or the model's files were changed",
        )
