"""Offline verification of a certificate: needs the file and two public keys, and nothing else."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from llmos.crypto import dsse
from llmos.crypto.notes import Verifier
from llmos.errors import LlmosError, VerificationFailed
from llmos.kernel import accounting
from llmos.privacy import (
    Mechanism,
    Neighboring,
    PrivacyLoss,
    PrivacyUnit,
    mechanism_from_dict,
)
from llmos.reports import conclusions, evidence
from llmos.reports.bundle import CertificateFile, open_file, read_json, read_proof
from llmos.reports.certificate import DIGEST_FIELD, STATEMENT_TYPE
from llmos.transparency.proofs import LogProof, verify_proof
from llmos.transparency.public_keys import read_public_keys

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
    records_checked: int | None  # log entries that the sentences rest on; None before version 2

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
        } | self._sentences()

    def _sentences(self) -> dict[str, str]:
        """Say what stands behind the sentences, and how many questions people have answered."""
        if self.records_checked is None:
            return {"records": "not checked: a certificate of version 1 carries no log entries"}
        registry = self.predicate["registry"]
        missing = ", ".join(registry["missing"])
        return {
            "records": f"{self.records_checked} log entries proven; all sentences follow from them "
            "and from what the home has signed",
            "registry": f"tier {registry['tier']}" + (f"; open: {missing}" if missing else ""),
        }


def verify_bundle(
    data: bytes, public_keys: str, *, model_digest: str | None = None
) -> VerifiedCertificate:
    """Check a certificate file: form, signature, log proofs, epsilon and every sentence made anew.

    Args:
        data: the file; only the one canonical spelling of its JSON is accepted.
        public_keys: the two lines of `home.pub`, certificate key first.
        model_digest: SHA-256 of the model's files at hand, hex, to compare with the certified one.

    Raises:
        VerificationFailed: a check failed; the message says which.
    """
    certificate_key, log_key = read_public_keys(public_keys)
    file = open_file(data)
    payload = dsse.open_envelope(file.envelope, certificate_key, payload_type=dsse.IN_TOTO)
    entry = verify_proof(file.proof, log_key)
    _check_entry(entry, payload)
    statement = read_json(payload, "the signed statement")
    verified = _read_statement(statement, file, log_key.name, model_digest)
    if verified.issuer != certificate_key.name:
        raise VerificationFailed(f"the certificate names another issuer: {verified.issuer!r}")
    if file.records is not None:
        _check_records(verified, file.records, entry, log_key)
    return verified


def verify_log_proof(data: bytes, public_keys: str) -> dict[str, Any]:
    """Check the file that `llmos log prove` writes and return the proven entry with its place.

    Raises:
        VerificationFailed: a check failed; the message says which.
    """
    _, log_key = read_public_keys(public_keys)
    proof = read_proof(read_json(data, "the log proof"))
    entry = verify_proof(proof, log_key)
    return {"log": log_key.name, "log_index": proof.index, "log_size": proof.size, "entry": entry}


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
    statement: Mapping[str, Any], file: CertificateFile, log: str, model_digest: str | None
) -> VerifiedCertificate:
    types = (statement.get("_type"), statement.get("predicateType"))
    if types != (STATEMENT_TYPE, file.predicate_type):
        raise VerificationFailed("the signed statement is not a privacy certificate of its version")
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
            log_index=file.proof.index,
            log_size=file.proof.size,
            statement=statement,
            records_checked=None if file.records is None else len(file.records),
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


def _check_records(
    verified: VerifiedCertificate,
    proofs: Mapping[str, LogProof],
    entry: Mapping[str, Any],
    log_key: Verifier,
) -> None:
    """Hold the predicate against the log entries that it rests on, and its sentences against it."""
    predicate = verified.predicate
    try:
        _check_subject(verified, entry)
        _check_replace_one(verified)
        evidence.check(predicate, proofs, log_key)
        conclusions.check(predicate)
    except VerificationFailed:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, LlmosError) as error:
        raise VerificationFailed(
            f"the signed statement lacks or misuses a field: {error}"
        ) from error


def _check_subject(verified: VerifiedCertificate, entry: Mapping[str, Any]) -> None:
    """Hold the predicate against the statement's subject and the certificate's own log entry."""
    deployment = verified.predicate["deployment"]
    if (deployment["model"], deployment["digest"]) != (verified.model, {"sha256": verified.digest}):
        raise VerificationFailed("the subject is not the model that the certificate is about")
    about = (deployment["issued_by"], f"Model::{verified.model}")
    if (entry.get("actor"), entry.get("resource")) != about:
        raise VerificationFailed("its log entry has another actor or is about another model")


def _check_replace_one(verified: VerifiedCertificate) -> None:
    printed = verified.predicate["guarantee"]["replace_one_epsilon"]
    if printed is None:
        return
    derived = accounting.epsilon(verified.mechanism, verified.loss.delta, Neighboring.REPLACE_ONE)
    if not math.isclose(float(printed), derived, rel_tol=EPSILON_TOLERANCE, abs_tol=1e-12):
        raise VerificationFailed(
            f"the certificate says epsilon {printed:.6g} for replace-one, its mechanism gives "
            f"{derived:.6g}"
        )
