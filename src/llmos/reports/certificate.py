"""The privacy certificate: a signed in-toto statement, and the file that carries it with its proof.

The predicate's sections follow the pyramid of NIST SP 800-226 from the guarantee down to the data,
and hold what tier 3 of the DP Deployments Registry asks for (arXiv:2509.13509).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import rfc8785

from llmos.crypto import dsse
from llmos.crypto.notes import NoteKey, decode_base64
from llmos.errors import LeakFound
from llmos.privacy import (
    Classification,
    JsonScalar,
    Mechanism,
    PrivacyLoss,
    mechanism_to_dict,
)
from llmos.reports.scope import NOT_PROTECTED, QUESTIONS
from llmos.transparency.proofs import LogProof

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://llmos.dev/privacy-certificate/v1"
MEDIA_TYPE: Final = "application/vnd.llmos.privacy-certificate.v1+json"
DIGEST_FIELD: Final = "certificate_sha256"  # in the details of the log entry


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The certified model and what it was made from."""

    name: str
    digest: str  # SHA-256 over the model's files, hex
    kind: str  # e.g. "LoRA adapter"
    base: str
    base_digest: str
    base_licence: str
    log_index: int | None = None  # the record of its publication


@dataclass(frozen=True, slots=True)
class GuaranteeFacts:
    """What was guaranteed, and by which calculation."""

    loss: PrivacyLoss
    mechanism: Mechanism  # as it was run
    accountant: str  # e.g. "Privacy loss distribution, dp-accounting 0.6.0"
    discretization: float  # of the privacy loss, nats
    theorem: str
    replace_one_epsilon: float | None = None  # at the same delta, for readers of that adjacency
    log_index: int | None = None  # the record of the settlement


@dataclass(frozen=True, slots=True)
class TrainingFacts:
    """How the mechanism was carried out."""

    clip_norm: float
    sampler: str
    parameters: Mapping[str, JsonScalar]  # every other setting that shaped the model
    randomness: str
    production: bool  # False when a seed was given: then noise can be replayed
    dtype_path: str
    self_test: Mapping[str, JsonScalar]
    released: tuple[str, ...]  # everything data-dependent that left the training
    engine: str
    llmos_version: str
    job: str
    log_index: int | None = None  # the record of the admission


@dataclass(frozen=True, slots=True)
class DatasetFacts:
    """The data that were protected."""

    name: str
    fingerprint: str  # SHA-256 of the stored plaintext, hex
    classification: Classification
    purposes: tuple[str, ...]
    units: int
    records: int
    log_index: int | None = None  # the record of the import


@dataclass(frozen=True, slots=True)
class BudgetFacts:
    """The dataset's pool after this training; Renyi divergences are in 1e-12 nats."""

    epsilon: float
    delta: float
    renyi_order: float
    cap: int
    spent: int
    held: int
    theorem: str
    log_index: int | None = None


@dataclass(frozen=True, slots=True)
class LeakageFacts:
    """What was measured: the leak report as its JSON document."""

    document: Mapping[str, Any]
    log_index: int | None = None


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """Everything that a certificate says; each `log_index` points to the record it rests on."""

    issued_at: str  # RFC 3339, UTC
    curator: str
    intended_use: str
    model: ModelFacts
    guarantee: GuaranteeFacts
    training: TrainingFacts
    dataset: DatasetFacts
    budget: BudgetFacts
    leakage: LeakageFacts | None = None


def statement(facts: CertificateFacts, issuer: str) -> dict[str, Any]:
    """Build the in-toto statement whose subject is the model."""
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": facts.model.name, "digest": {"sha256": facts.model.digest}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "issued_at": facts.issued_at,
            "issuer": issuer,
            "deployment": {
                "curator": facts.curator,
                "intended_use": facts.intended_use,
                "model": facts.model.name,
                "trust_model": "central: the operator of this home sees the raw data",
            },
            "guarantee": _guarantee(facts.guarantee),
            "algorithm": _algorithm(facts),
            "implementation": _implementation(facts),
            "data": _data(facts.dataset),
            "budget": _budget(facts.budget),
            "measured_leakage": None if facts.leakage is None else _leakage(facts.leakage),
            "not_protected": list(NOT_PROTECTED),
            "questions_for_a_person": list(QUESTIONS),
        },
    }


def seal(facts: CertificateFacts, key: NoteKey) -> dict[str, Any]:
    """Sign the statement and return its DSSE envelope.

    Raises:
        LeakFound: the measurement refutes the guarantee, so there is nothing to certify.
    """
    if facts.leakage is not None and facts.leakage.document["verdict"] == "fail":
        raise LeakFound(
            f"{facts.model.name} was measured to leak more than epsilon "
            f"{facts.guarantee.loss.epsilon:.3g}: it gets no certificate",
            hint="do not release this model; the training code or its accounting is broken",
        )
    payload = rfc8785.dumps(statement(facts, key.name))
    return dsse.sign(payload, dsse.IN_TOTO, key)


def log_details(envelope: Mapping[str, Any]) -> dict[str, str]:
    """Return what the log entry of this certificate must hold in its details."""
    payload = decode_base64(envelope["payload"])
    return {DIGEST_FIELD: hashlib.sha256(payload).hexdigest()}


def bundle(envelope: Mapping[str, Any], proof: LogProof) -> bytes:
    """Return the certificate file: canonical JSON of the envelope and its proof of being logged."""
    return rfc8785.dumps(
        {"mediaType": MEDIA_TYPE, "envelope": dict(envelope), "log_proof": proof.to_dict()}
    )


def _guarantee(facts: GuaranteeFacts) -> dict[str, Any]:
    return {
        "definition": "(epsilon, delta)-differential privacy",
        "unit": facts.loss.unit.column,
        "neighboring": str(facts.loss.neighboring),
        "epsilon": facts.loss.epsilon,
        "delta": facts.loss.delta,
        "replace_one_epsilon": facts.replace_one_epsilon,
        "accountant": facts.accountant,
        "discretization": facts.discretization,
        "theorem": facts.theorem,
        "log_index": facts.log_index,
    }


def _algorithm(facts: CertificateFacts) -> dict[str, Any]:
    training = facts.training
    return {
        "mechanism": mechanism_to_dict(facts.guarantee.mechanism),
        "sampler": training.sampler,
        "clip_norm": training.clip_norm,
        "parameters": dict(training.parameters),
        "base_model": {
            "name": facts.model.base,
            "digest": {"sha256": facts.model.base_digest},
            "licence": facts.model.base_licence,
        },
        "model_kind": facts.model.kind,
        "log_index": facts.model.log_index,
    }


def _implementation(facts: CertificateFacts) -> dict[str, Any]:
    training = facts.training
    return {
        "randomness": training.randomness,
        "production": training.production,
        "dtype_path": training.dtype_path,
        "self_test": dict(training.self_test),
        "released": list(training.released),
        "engine": training.engine,
        "llmos_version": training.llmos_version,
        "job": training.job,
        "log_index": training.log_index,
    }


def _data(facts: DatasetFacts) -> dict[str, Any]:
    return {
        "name": facts.name,
        "fingerprint": {"sha256": facts.fingerprint},
        "classification": str(facts.classification),
        "purposes": list(facts.purposes),
        "units": facts.units,
        "records": facts.records,
        "log_index": facts.log_index,
    }


def _budget(facts: BudgetFacts) -> dict[str, Any]:
    return {
        "epsilon": facts.epsilon,
        "delta": facts.delta,
        "renyi_order": facts.renyi_order,
        "cap": facts.cap,
        "spent": facts.spent,
        "held": facts.held,
        "divergence_unit": "1e-12 nats",
        "theorem": facts.theorem,
        "log_index": facts.log_index,
    }


def _leakage(facts: LeakageFacts) -> dict[str, Any]:
    """Summarise the leak report and commit to the whole of it by its hash."""
    document = facts.document
    canaries = document["canaries"]
    summary = {
        "leak_report_sha256": hashlib.sha256(rfc8785.dumps(dict(document))).hexdigest(),
        "verdict": document["verdict"],
        "epsilon_lower_bound": document["bound"],
        "record_membership": document["records"]["base_minus_tuned"],
        "log_index": facts.log_index,
    }
    if canaries is not None:
        summary["canary_membership"] = canaries["membership"]
        summary["extraction_rate_planted"] = canaries["extraction_rate_planted"]
        summary["extraction_rate_unplanted"] = canaries["extraction_rate_unplanted"]
    return summary
