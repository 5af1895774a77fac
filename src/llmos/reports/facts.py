"""What a certificate is made from: facts of the models, the ledger, the log, the measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmos.privacy import Classification, JsonScalar, Mechanism, PrivacyLoss
from llmos.reports.questions import Answer
from llmos.transparency.proofs import LogProof


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The certified model and what it was made from."""

    name: str
    digest: str  # SHA-256 over the model's files, hex
    kind: str  # e.g. "LoRA adapter"
    base: str
    base_digest: str
    base_licence: str


@dataclass(frozen=True, slots=True)
class GuaranteeFacts:
    """What was guaranteed, and by which calculation."""

    loss: PrivacyLoss
    mechanism: Mechanism  # as it was run
    accountant: str  # e.g. "Privacy loss distribution, dp-accounting 0.6.0"
    discretization: float  # of the privacy loss, nats
    replace_one_epsilon: float | None = None  # at the same delta, for readers of that adjacency


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


@dataclass(frozen=True, slots=True)
class DatasetFacts:
    """The data that were protected."""

    name: str
    fingerprint: str  # SHA-256 of the stored plaintext, hex
    classification: Classification
    purposes: tuple[str, ...]
    units: int
    records: int
    block: Mapping[str, Any] | None = None  # of which dataset it is which of how many blocks


@dataclass(frozen=True, slots=True)
class BudgetFacts:
    """The dataset's pool after this training; Renyi divergences are in 1e-12 nats."""

    epsilon: float
    delta: float
    renyi_order: float
    cap: int
    spent: int
    held: int
    charged: Mapping[str, int]  # by this training: pool -> amount


@dataclass(frozen=True, slots=True)
class LeakageFacts:
    """What was measured: the leak report as its JSON document."""

    document: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """Everything that a certificate says, and the log entries that it rests on."""

    issued_at: str  # RFC 3339, UTC
    issued_by: str  # the principal; also the actor of the certificate's own log entry
    purpose: str  # that the training was admitted for
    model: ModelFacts
    guarantee: GuaranteeFacts
    training: TrainingFacts
    dataset: DatasetFacts
    budget: BudgetFacts
    evidence: Mapping[str, LogProof]  # see reports.evidence
    leakage: LeakageFacts | None = None
    answers: Mapping[str, Answer] = field(default_factory=dict)  # what people said, by question
