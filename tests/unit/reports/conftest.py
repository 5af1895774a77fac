"""One certificate with everything in it, made from real parts."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import rfc8785
from tests.lying_coordinator import file, job
from tests.trees import Tree

from llmos.attacks import leak
from llmos.attacks.inversion import (
    InversionArm,
    InversionReport,
    Observation,
    Sample,
    Uniformity,
)
from llmos.attacks.leak import measure, to_document
from llmos.attacks.scores import Scores
from llmos.attacks.subject import MeasuredModel
from llmos.crypto import dsse
from llmos.crypto.notes import Checkpoint, NoteKey, sign_note
from llmos.kernel import accounting, pricing
from llmos.privacy import (
    Classification,
    Neighboring,
    PoissonSampledGaussian,
    PrivacyLoss,
    PrivacyUnit,
    mechanism_to_dict,
)
from llmos.reports.certificate import bundle, log_details, seal, statement
from llmos.reports.conclusions import conclude
from llmos.reports.facts import (
    BudgetFacts,
    CertificateFacts,
    DatasetFacts,
    GuaranteeFacts,
    LeakageFacts,
    ModelFacts,
    TrainingFacts,
)
from llmos.reports.questions import QUESTIONS, Answer
from llmos.transparency.audit_paths import inclusion_proof
from llmos.transparency.proofs import LogProof

__all__ = ["file", "job"]  # fixtures of a federated certificate

Document = dict[str, Any]
DELTA = 1e-5
MECHANISM = PoissonSampledGaussian(0.1, 2.0, 20)
DIGEST = "ab" * 32
ORDER = 3.0
CAP = int(accounting.renyi_cap(8.0, DELTA, ORDER) * pricing.UNITS_PER_NAT)
CHARGED = pricing.cost(MECHANISM, ORDER)
SIGNED = "Dr. Mei Wu, data protection officer"
ALL_ANSWERS = {
    question.id: Answer(question.choices[0] if question.choices else f"On {question.id}.", SIGNED)
    for question in QUESTIONS
}


@pytest.fixture(scope="session")
def loss() -> PrivacyLoss:
    return PrivacyLoss(accounting.epsilon(MECHANISM, DELTA), DELTA, PrivacyUnit("patient_id"))


def _scores(losses: np.ndarray) -> Scores:
    tokens = np.full(len(losses), 6, dtype=np.int64)
    return Scores(losses.astype(float), tokens, np.where(losses < 3, 6, 2).astype(np.int64))


@pytest.fixture(scope="session")
def make_document() -> Callable[..., Document]:
    """Return a maker of leak reports, leaking or not."""

    def make(
        model: str, guarantee: PrivacyLoss | None, *, leaking: bool, canaries: bool = True
    ) -> Document:
        rng = np.random.default_rng(4)
        planted = np.arange(80) % 2 == 0
        secrets = np.where(planted & leaking, 0.5, 14) + rng.normal(0, 0.2, 80)
        records = rng.normal(20, 2, 120)
        return to_document(
            measure(
                MeasuredModel(
                    model, DIGEST if guarantee else "ef" * 32, "base", "notes", "cd" * 32
                ),
                guarantee,
                members=_scores(records - (8 if leaking else 0)),
                heldout=_scores(rng.normal(20, 2, 120)),
                base_members=_scores(records + 9),
                base_heldout=_scores(rng.normal(29, 2, 120)),
                canaries=_scores(secrets) if canaries else None,
                planted=planted if canaries else None,
                category_tokens=[2] * 120,
            )
        )

    return make


def with_inversion(document: Document, p_value: float = 0.3, **changes: Any) -> Document:
    """Return a leak report with an attack on a site's messages, masked ones with a p-value."""
    report = leak.from_json(rfc8785.dumps(document))
    p_values = dict.fromkeys(Observation, 1e-9) | {Observation.MASKED: p_value}
    made = InversionReport(
        subject=report.subject,
        sample=Sample(offered=9, used=8, cut_to=15),
        parametrisation="ffa",
        rank=16,
        layers=("q",),
        vocabulary=500,
        aggregation="masked",
        noise_multiplier=0.7,
        clip_norm=1.0,
        arms=tuple(InversionArm(k, 8, 90, 1.0, 0.01, p, 1.0, 4.0) for k, p in p_values.items()),
        uniformity=Uniformity(123456, 0.5),
    )
    return to_document(replace(report, inversion=replace(made, **changes)))


@pytest.fixture(scope="session")
def facts(
    loss: PrivacyLoss,
    make_document: Callable[..., Document],
    prove_records: Callable[[CertificateFacts], dict[str, LogProof]],
) -> CertificateFacts:
    made = CertificateFacts(
        issued_at="2026-11-23T10:00:00.000Z",
        issued_by="admin",
        purpose="training",
        model=ModelFacts("ward", DIGEST, "LoRA adapter", "base", "12" * 32, "Apache-2.0"),
        guarantee=GuaranteeFacts(
            loss,
            MECHANISM,
            "PLD, dp-accounting 0.6.0",
            1e-4,
            accounting.epsilon(MECHANISM, DELTA, Neighboring.REPLACE_ONE),
        ),
        training=TrainingFacts(
            clip_norm=1.0,
            sampler="Poisson over units",
            parameters={"learning_rate": 1e-3, "rank": 16, "expected_batch_units": 90},
            randomness="AES-256-CTR keyed by the operating system",
            production=True,
            dtype_path="base bfloat16, adapter and noise float32",
            self_test={"clipped_norm_relative_error": 1e-7},
            released=("final adapter", "number of steps"),
            engine="dp",
            llmos_version="0.1.0",
            job="job-1",
        ),
        dataset=DatasetFacts(
            "notes", "cd" * 32, Classification.SENSITIVE, ("training",), 900, 1000
        ),
        budget=BudgetFacts(8.0, DELTA, ORDER, CAP, CAP // 4, 0, {"notes": CHARGED}),
        evidence={},
        leakage=LeakageFacts(make_document("ward", loss, leaking=False)),
        answers={"consent": Answer("Patients' written consent of 2025.", SIGNED)},
    )
    return replace(made, evidence=prove_records(made))


@pytest.fixture(scope="session")
def keys() -> tuple[NoteKey, NoteKey]:
    return (
        NoteKey("llmos.local/1/certificates", os.urandom(32)),
        NoteKey("llmos.local/1", os.urandom(32)),
    )


@pytest.fixture(scope="session")
def public_keys(keys: tuple[NoteKey, NoteKey]) -> str:
    return "".join(f"{key.vkey}\n" for key in keys)


def records_for(facts: CertificateFacts) -> dict[str, Document]:
    """Return the log entries that the monitor would have written."""
    training = {"action": "train-private", "resource": f"Dataset::{facts.dataset.name}"}
    job = {"job": facts.training.job}
    mechanism = mechanism_to_dict(facts.guarantee.mechanism)
    costs = {pool: str(amount) for pool, amount in facts.budget.charged.items()}
    request = {
        "model": facts.model.base,
        "output": facts.model.name,
        "clip": facts.training.clip_norm,
        "batch": facts.training.parameters["expected_batch_units"],
        "delta": facts.guarantee.loss.delta,
        "purpose": facts.purpose,
    }
    records: dict[str, Document] = {
        "import": {
            "action": "import-data",
            "resource": f"Dataset::{facts.dataset.name}",
            "outcome": "done",
            "details": {
                "fingerprint": facts.dataset.fingerprint,
                "units": facts.dataset.units,
                "records": facts.dataset.records,
                "unit": facts.guarantee.loss.unit.column,
                "classification": str(facts.dataset.classification),
                "purposes": list(facts.dataset.purposes),
                **({} if facts.dataset.block is None else {"block": dict(facts.dataset.block)}),
            },
        },
        "fit": {
            **training,
            "outcome": "admitted",
            "details": {**job, **request, "step": "fit", "mechanism": mechanism, "costs": costs},
        },
        "settle": {
            **training,
            "outcome": "settled",
            "details": {**job, "step": "settle", "mechanism": mechanism, "costs": costs},
        },
        "publish": {
            **training,
            "outcome": "done",
            "details": {**job, **request, "step": "publish", "digest": facts.model.digest},
        },
    }
    if facts.leakage is not None:
        document = facts.leakage.document
        records["measure"] = {
            "action": "measure",
            "resource": f"Model::{facts.model.name}",
            "outcome": "done",
            "details": {
                "leak_report_sha256": hashlib.sha256(rfc8785.dumps(document)).hexdigest(),
                "verdict": document["verdict"],
                "epsilon_lower_bound": document["bound"]["lower"],
            },
        }
    head = {"v": 1, "at": "2026-11-23T09:00:00.000Z", "actor": "admin"}
    return {name: head | record for name, record in records.items()}


def prove_all(entries: Sequence[Mapping[str, Any]], log_key: NoteKey) -> list[LogProof]:
    """Put entries into a log of their own between others and prove each."""
    leaves = [
        *(b"entry %d" % i for i in range(12)),
        *(rfc8785.dumps(dict(entry)) for entry in entries),
        b"a later entry",
    ]
    tree = Tree(leaves)
    note = sign_note(Checkpoint(log_key.name, tree.size, tree.root(tree.size)).text(), log_key)
    return [
        LogProof(
            index, tree.size, inclusion_proof(index, tree.size, tree.read), note, leaves[index]
        )
        for index in range(12, tree.size - 1)
    ]


@pytest.fixture(scope="session")
def prove_records(
    keys: tuple[NoteKey, NoteKey],
) -> Callable[[CertificateFacts], dict[str, LogProof]]:
    """Return a function that puts the records behind facts into a log and proves them."""

    def prove(facts: CertificateFacts) -> dict[str, LogProof]:
        records = records_for(facts)
        return dict(zip(records, prove_all(list(records.values()), keys[1]), strict=True))

    return prove


def log_entry(envelope: Mapping[str, Any], **changes: Any) -> Document:
    """Return the certificate's own log entry."""
    return {
        "v": 1,
        "at": "2026-11-23T10:00:01.000Z",
        "actor": "admin",
        "action": "report",
        "resource": "Model::ward",
        "outcome": "done",
        "details": log_details(envelope),
        **changes,
    }


@pytest.fixture(scope="session")
def make_bundle(
    keys: tuple[NoteKey, NoteKey],
    prove_records: Callable[[CertificateFacts], dict[str, LogProof]],
) -> Callable[..., bytes]:
    """Return a maker of whole certificate files; `entry` changes the log entry's fields."""

    def make(facts: CertificateFacts, **entry: Any) -> bytes:
        proven = replace(facts, evidence=prove_records(facts))
        envelope = seal(proven, keys[0])
        (proof,) = prove_all([log_entry(envelope, **entry)], keys[1])
        return bundle(envelope, proof, proven.evidence)

    return make


@pytest.fixture(scope="session")
def make_signed(keys: tuple[NoteKey, NoteKey], facts: CertificateFacts) -> Callable[..., bytes]:
    """Return a maker of files from any statement, properly signed and logged."""

    def make(
        made: Document, *, key: NoteKey | None = None, records: Mapping[str, LogProof] | None = None
    ) -> bytes:
        envelope = dsse.sign(rfc8785.dumps(made), dsse.IN_TOTO, key or keys[0])
        (proof,) = prove_all([log_entry(envelope)], keys[1])
        return bundle(envelope, proof, facts.evidence if records is None else records)

    return make


@pytest.fixture(scope="session")
def made(facts: CertificateFacts, keys: tuple[NoteKey, NoteKey]) -> Document:
    """Return the statement as a verifier reads it; copy it before changing it."""
    read: Document = json.loads(rfc8785.dumps(statement(facts, keys[0].name)))
    return read


@pytest.fixture(scope="session")
def make_changed(
    made: Document, make_signed: Callable[..., bytes]
) -> Callable[[Callable[[Document], object]], bytes]:
    """Return a maker of files whose statement was changed before it was signed and logged."""

    def make(change: Callable[[Document], object]) -> bytes:
        changed = copy.deepcopy(made)
        change(changed)
        return make_signed(changed)

    return make


@pytest.fixture(scope="session")
def make_forged(
    made: Document, make_signed: Callable[..., bytes]
) -> Callable[[Callable[[Document], object]], bytes]:
    """Return a maker of files whose conclusions were made anew from changed records."""

    def make(change: Callable[[Document], object]) -> bytes:
        forged = copy.deepcopy(made)
        change(forged)
        predicate = forged["predicate"]
        conclusions = ("assessment", "hazards", "questions", "registry")
        records = {name: part for name, part in predicate.items() if name not in conclusions}
        forged["predicate"] = records | conclude(records)
        return make_signed(forged)

    return make


@pytest.fixture(scope="session")
def certificate(make_bundle: Callable[..., bytes], facts: CertificateFacts) -> bytes:
    return make_bundle(facts)
