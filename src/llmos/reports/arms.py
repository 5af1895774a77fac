"""One measured model as the page and the figures show it, read from its leak report."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import rfc8785

from llmos.errors import MeasurementError
from llmos.reports import inversions
from llmos.reports.inversions import Inversion

LEAK_REPORT_SCHEMA: Final = "llmos.leak-report/v1"
ROUNDING_SLACK: Final = 1e-9  # 100 * 1.1 is a little more than 110 in binary
LARGEST_EXPONENT: Final = 709.0  # exp overflows a double above


@dataclass(frozen=True, slots=True)
class Attack:
    """One membership attack; 0.5 is chance."""

    auc: float
    standard_error: float
    tpr_at_1_percent_fpr: float | None
    members: int
    nonmembers: int


@dataclass(frozen=True, slots=True)
class Secrets:
    """What became of the planted canaries."""

    attack: Attack
    extraction_planted: float
    extraction_unplanted: float
    exposure_bits: float
    chance_exposure_bits: float
    largest_exposure_bits: float
    code_length_bits_planted: tuple[float, ...]  # one per canary
    code_length_bits_unplanted: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Arm:
    """One model beside another."""

    model: str
    digest: str
    base: str
    dataset: str
    report_sha256: str
    verdict: str
    epsilon: float | None  # guaranteed; None claims nothing
    delta: float | None
    epsilon_lower: float | None  # measured, with `confidence`
    confidence: float | None
    guesses: int
    correct: int
    records: Attack  # the headline attack on natural records
    records_raw: Attack
    secrets: Secrets | None
    heldout_perplexity: float
    member_perplexity: float
    base_perplexity: float
    heldout_exact: float
    base_heldout_exact: float
    heldout_category: float | None
    inversion: Inversion | None  # of a site's messages, where they were attacked

    @property
    def label(self) -> str:
        """Name the model with what it claims."""
        claim = "no guarantee" if self.epsilon is None else f"ε ≤ {at_most(self.epsilon)}"
        return f"{self.model} ({claim})"


def at_most(value: float) -> str:
    """Write an upper bound, rounded up to two places.

    >>> at_most(1.0747), at_most(8.0), at_most(math.inf)
    ('1.08', '8', '∞')
    """
    if math.isinf(value):
        return "∞"
    return f"{math.ceil(100 * value - ROUNDING_SLACK) / 100:g}"


def at_least(value: float) -> str:
    """Write a lower bound, rounded down to two places.

    >>> at_least(2.789)
    '2.78'
    """
    return f"{math.floor(100 * value + ROUNDING_SLACK) / 100:.2f}"


def read_arm(document: Mapping[str, Any]) -> Arm:
    """Read the JSON document of a leak report.

    Raises:
        MeasurementError: it is none, or of another version.
    """
    if document.get("schema") != LEAK_REPORT_SCHEMA:
        raise MeasurementError("this is not a leak report of version 1")
    try:
        return _arm(document)
    except (KeyError, TypeError, ValueError) as error:
        raise MeasurementError(f"the leak report lacks or misuses a field: {error}") from error


def _arm(document: Mapping[str, Any]) -> Arm:
    subject, quality = document["subject"], document["quality"]
    guarantee, bound = document["guarantee"] or {}, document["bound"] or {}
    canaries = document["canaries"]
    return Arm(
        model=subject["model"],
        digest=subject["digest"],
        base=subject["base"],
        dataset=subject["dataset"],
        report_sha256=hashlib.sha256(rfc8785.dumps(dict(document))).hexdigest(),
        verdict=document["verdict"],
        epsilon=guarantee.get("epsilon"),
        delta=guarantee.get("delta"),
        epsilon_lower=bound.get("lower"),
        confidence=bound.get("confidence"),
        guesses=bound.get("guesses", 0),
        correct=bound.get("correct", 0),
        records=_attack(document["records"]["base_minus_tuned"]),
        records_raw=_attack(document["records"]["raw_loss"]),
        secrets=None if canaries is None else _secrets(canaries),
        heldout_perplexity=_perplexity(quality["heldout_loss"]),
        member_perplexity=_perplexity(quality["member_loss"]),
        base_perplexity=_perplexity(quality["base_heldout_loss"]),
        heldout_exact=quality["heldout_exact_match_rate"],
        base_heldout_exact=quality["base_heldout_exact_match_rate"],
        heldout_category=quality["heldout_category_match_rate"],
        inversion=inversions.read(document["inversion"]) if "inversion" in document else None,
    )


def _attack(fields: Mapping[str, Any]) -> Attack:
    return Attack(
        auc=float(fields["auc"]),
        standard_error=float(fields["auc_standard_error"]),
        tpr_at_1_percent_fpr=fields["tpr_at_1_percent_fpr"],
        members=int(fields["members"]),
        nonmembers=int(fields["nonmembers"]),
    )


def _secrets(fields: Mapping[str, Any]) -> Secrets:
    def bits(name: str) -> tuple[float, ...]:
        return tuple(float(nats) / math.log(2) for nats in fields[name])

    return Secrets(
        attack=_attack(fields["membership"]),
        extraction_planted=float(fields["extraction_rate_planted"]),
        extraction_unplanted=float(fields["extraction_rate_unplanted"]),
        exposure_bits=float(fields["mean_exposure_bits"]),
        chance_exposure_bits=float(fields["chance_exposure_bits"]),
        largest_exposure_bits=float(fields["largest_exposure_bits"]),
        code_length_bits_planted=bits("losses_nats_planted"),
        code_length_bits_unplanted=bits("losses_nats_unplanted"),
    )


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < LARGEST_EXPONENT else math.inf
