"""One certificate with everything in it, made from real parts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import rfc8785

from llmos.attacks.leak import MeasuredModel, measure, to_document
from llmos.attacks.scoring import Scores
from llmos.crypto import dsse
from llmos.crypto.merkle import (
    completed_nodes,
    leaf_hash,
    tree_root,
)
from llmos.crypto.notes import Checkpoint, NoteKey, sign_note
from llmos.kernel import accounting
from llmos.privacy import (
    Classification,
    PoissonSampledGaussian,
    PrivacyLoss,
    PrivacyUnit,
)
from llmos.reports.certificate import (
    BudgetFacts,
    CertificateFacts,
    DatasetFacts,
    GuaranteeFacts,
    LeakageFacts,
    ModelFacts,
    TrainingFacts,
    bundle,
    log_details,
    seal,
    statement,
)
from llmos.reports.theorems import THEOREMS
from llmos.transparency.audit_paths import inclusion_proof
from llmos.transparency.proofs import LogProof

Document = dict[str, Any]
DELTA = 1e-5
MECHANISM = PoissonSampledGaussian(0.1, 2.0, 20)
DIGEST = "ab" * 32


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


@pytest.fixture(scope="session")
def facts(loss: PrivacyLoss, make_document: Callable[..., Document]) -> CertificateFacts:
    return CertificateFacts(
        issued_at="2026-11-23T10:00:00.000Z",
        curator="Ward 7",
        intended_use="suggest ICD-10 categories",
        model=ModelFacts("ward", DIGEST, "LoRA adapter", "base", "12" * 32, "Apache-2.0", 9),
        guarantee=GuaranteeFacts(
            loss, MECHANISM, "PLD, dp-accounting 0.6.0", 1e-4, THEOREMS["pld"], 1.9, 8
        ),
        training=TrainingFacts(
            clip_norm=1.0,
            sampler="Poisson over units",
            parameters={"learning_rate": 1e-3, "rank": 16},
            randomness="AES-256-CTR keyed by the operating system",
            production=True,
            dtype_path="base bfloat16, adapter and noise float32",
            self_test={"clipped_norm_relative_error": 1e-7},
            released=("final adapter", "number of steps"),
            engine="dp",
            llmos_version="0.1.0",
            job="job-1",
            log_index=5,
        ),
        dataset=DatasetFacts(
            "notes", "cd" * 32, Classification.SENSITIVE, ("training",), 900, 1000, 2
        ),
        budget=BudgetFacts(8.0, 1e-5, 3.2, 4_000_000_000_000, 1_000_000_000_000, 0, "filter", 8),
        leakage=LeakageFacts(make_document("ward", loss, leaking=False), 10),
    )


@pytest.fixture(scope="session")
def keys() -> tuple[NoteKey, NoteKey]:
    return (
        NoteKey("llmos.local/1/certificates", os.urandom(32)),
        NoteKey("llmos.local/1", os.urandom(32)),
    )


@pytest.fixture(scope="session")
def public_keys(keys: tuple[NoteKey, NoteKey]) -> str:
    return "".join(f"{key.vkey}\n" for key in keys)


def _prove(entry: Mapping[str, Any], log_key: NoteKey, *, before: int = 12) -> LogProof:
    """Put an entry into a log of its own between others and prove it."""
    data = rfc8785.dumps(dict(entry))
    leaves = [*(b"entry %d" % i for i in range(before)), data, b"a later entry"]
    nodes: dict[tuple[int, int], bytes] = {}
    for size, leaf in enumerate(leaves):
        for level, index, node in completed_nodes(size, leaf_hash(leaf), lambda *at: nodes[at]):
            nodes[level, index] = node
    size = len(leaves)
    root = tree_root(size, lambda *at: nodes[at])
    hashes = inclusion_proof(before, size, lambda *at: nodes[at])
    note = sign_note(Checkpoint(log_key.name, size, root).text(), log_key)
    return LogProof(before, size, hashes, note, data)


def _log_entry(envelope: Mapping[str, Any], **changes: Any) -> Document:
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
def make_bundle(keys: tuple[NoteKey, NoteKey]) -> Callable[..., bytes]:
    """Return a maker of whole certificate files; `entry` changes the log entry's fields."""

    def make(facts: CertificateFacts, **entry: Any) -> bytes:
        envelope = seal(facts, keys[0])
        return bundle(envelope, _prove(_log_entry(envelope, **entry), keys[1]))

    return make


@pytest.fixture(scope="session")
def make_changed(keys: tuple[NoteKey, NoteKey], facts: CertificateFacts) -> Callable[..., bytes]:
    """Return a maker of files whose statement was changed before it was signed and logged."""

    def make(change: Callable[[Document], object]) -> bytes:
        made = statement(facts, keys[0].name)
        change(made)
        envelope = dsse.sign(rfc8785.dumps(made), dsse.IN_TOTO, keys[0])
        return bundle(envelope, _prove(_log_entry(envelope), keys[1]))

    return make


@pytest.fixture(scope="session")
def certificate(make_bundle: Callable[..., bytes], facts: CertificateFacts) -> bytes:
    return make_bundle(facts)
