"""The privacy certificate: a signed in-toto statement, and the file with it and its proofs.

The predicate has two kinds of sections: records, what was guaranteed, run, charged and measured,
and conclusions, which follow from them (`reports.conclusions`): the assessment along the pyramid
of NIST SP 800-226, the checklist of hazards, the questions that only people can answer, and the
record for the DP Deployments Registry (arXiv:2509.13509).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final

import rfc8785

from llmos.crypto import dsse
from llmos.crypto.notes import NoteKey, decode_base64
from llmos.errors import LeakFound
from llmos.privacy import mechanism_to_dict
from llmos.reports import evidence, questions
from llmos.reports.conclusions import conclude
from llmos.reports.facts import (
    BudgetFacts,
    CertificateFacts,
    DatasetFacts,
    GuaranteeFacts,
    LeakageFacts,
)
from llmos.reports.scope import NOT_PROTECTED, TRUST_MODEL
from llmos.reports.theorems import THEOREMS
from llmos.transparency.proofs import LogProof

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://llmos.dev/privacy-certificate/v2"
PREDICATE_TYPE_1: Final = "https://llmos.dev/privacy-certificate/v1"  # is verified, not made
MEDIA_TYPE: Final = "application/vnd.llmos.privacy-certificate.v2+json"
MEDIA_TYPE_1: Final = "application/vnd.llmos.privacy-certificate.v1+json"
DIGEST_FIELD: Final = "certificate_sha256"  # in the details of the log entry

_UTILITY: Final = (
    "heldout_records",
    "heldout_loss",
    "base_heldout_loss",
    "heldout_exact_match_rate",
    "base_heldout_exact_match_rate",
)


def statement(facts: CertificateFacts, issuer: str) -> dict[str, Any]:
    """Build the in-toto statement whose subject is the model."""
    records = records_of(facts, issuer)
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": facts.model.name, "digest": {"sha256": facts.model.digest}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": records | conclude(records),
    }


def records_of(facts: CertificateFacts, issuer: str) -> dict[str, Any]:
    """Return the predicate's sections that nothing else in it implies."""
    return {
        "issued_at": facts.issued_at,
        "issuer": issuer,
        "deployment": {
            "issued_by": facts.issued_by,
            "model": facts.model.name,
            "digest": {"sha256": facts.model.digest},
            "purpose": facts.purpose,
            "trust_model": TRUST_MODEL,
        },
        "guarantee": _guarantee(facts.guarantee),
        "algorithm": _algorithm(facts),
        "implementation": _implementation(facts),
        "data": _data(facts.dataset),
        "budget": _budget(facts.budget),
        "measured_leakage": None if facts.leakage is None else _leakage(facts.leakage),
        "records": evidence.pointers(facts.evidence),
        "answers": questions.to_dict(facts.answers),
        "not_protected": list(NOT_PROTECTED),
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


def bundle(envelope: Mapping[str, Any], proof: LogProof, records: Mapping[str, LogProof]) -> bytes:
    """Return the certificate file: canonical JSON of the envelope and the proofs of being logged.

    Args:
        envelope: what `seal` returned.
        proof: that the certificate itself is in the log.
        records: that the entries are which it rests on.
    """
    return rfc8785.dumps(
        {
            "mediaType": MEDIA_TYPE,
            "envelope": dict(envelope),
            "log_proof": proof.to_dict(),
            "records": {name: record.to_dict() for name, record in records.items()},
        }
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
        "theorem": THEOREMS["pld"],
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
    }


def _data(facts: DatasetFacts) -> dict[str, Any]:
    said = {
        "name": facts.name,
        "fingerprint": {"sha256": facts.fingerprint},
        "classification": str(facts.classification),
        "purposes": list(facts.purposes),
        "units": facts.units,
        "records": facts.records,
    }
    return said if facts.block is None else said | {"block": dict(facts.block)}


def _budget(facts: BudgetFacts) -> dict[str, Any]:
    return {
        "epsilon": facts.epsilon,
        "delta": facts.delta,
        "renyi_order": facts.renyi_order,
        "cap": facts.cap,
        "spent": facts.spent,
        "held": facts.held,
        "charged": {pool: str(amount) for pool, amount in facts.charged.items()},
        "divergence_unit": "1e-12 nats",
        "theorem": THEOREMS["filter"],
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
        "utility": {name: document["quality"][name] for name in _UTILITY},
    }
    if canaries is not None:
        summary["canary_membership"] = canaries["membership"]
        summary["extraction_rate_planted"] = canaries["extraction_rate_planted"]
        summary["extraction_rate_unplanted"] = canaries["extraction_rate_unplanted"]
    return summary
