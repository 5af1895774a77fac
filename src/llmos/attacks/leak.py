"""The leak report: what one model was measured to betray, beside what its ledger guarantees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import numpy as np
import rfc8785
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from llmos.attacks import inversion
from llmos.attacks.bound import EpsilonBound, one_run_bound
from llmos.attacks.canaries import CanaryLeak, canary_leak, canary_scores
from llmos.attacks.inversion import InversionReport
from llmos.attacks.membership import RecordMembership, record_membership
from llmos.attacks.scores import Scores
from llmos.attacks.subject import MeasuredModel
from llmos.errors import MeasurementError, UnaccountableMechanism
from llmos.privacy import Neighboring, PrivacyLoss

LEAK_REPORT_SCHEMA: Final = "llmos.leak-report/v1"
LARGEST_EXPONENT: Final = 709.0  # exp overflows a double above


class Verdict(StrEnum):
    """What the measurement says about the guarantee; it can refute one, never confirm one."""

    PASS = "pass"  # noqa: S105 - the lower bound does not exceed the guaranteed epsilon
    FAIL = "fail"  # the lower bound exceeds it: the training was not what the ledger says
    NO_GUARANTEE = "no-guarantee"  # none is claimed, so none can be refuted
    UNTESTED = "untested"  # no canaries were planted


@dataclass(frozen=True, slots=True)
class Quality:
    """What the model learnt; losses are in nats per token."""

    member_records: int
    member_loss: float
    heldout_records: int
    heldout_loss: float
    base_heldout_loss: float
    heldout_exact_match_rate: float  # greedy decoding gives back the whole completion
    base_heldout_exact_match_rate: float
    heldout_category_match_rate: float | None  # ... its first tokens, where the caller names them

    @property
    def heldout_perplexity(self) -> float:
        """Return exp of the held-out loss per token."""
        return _perplexity(self.heldout_loss)

    @property
    def base_heldout_perplexity(self) -> float:
        """Return exp of the base model's held-out loss per token."""
        return _perplexity(self.base_heldout_loss)


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < LARGEST_EXPONENT else math.inf


@dataclass(frozen=True, slots=True)
class LeakReport:
    """Aggregates over records and canaries of one model; no record can be read off it."""

    subject: MeasuredModel
    guarantee: PrivacyLoss | None  # what the ledger says; None claims nothing
    quality: Quality
    records: RecordMembership
    canaries: CanaryLeak | None
    bound: EpsilonBound | None
    inversion: InversionReport | None = None  # of a site's messages in the job that made it

    @property
    def model(self) -> str:
        """Return the measured model's name."""
        return self.subject.model

    @property
    def epsilon_ledger(self) -> float | None:
        """Return the epsilon that the ledger guarantees, None where it guarantees nothing."""
        return None if self.guarantee is None else self.guarantee.epsilon

    @property
    def failed(self) -> bool:
        """Tell whether the measurement refutes the guarantee."""
        return self.verdict is Verdict.FAIL

    @property
    def verdict(self) -> Verdict:
        """Compare the measured lower bound with the guaranteed epsilon."""
        if self.guarantee is None:
            return Verdict.NO_GUARANTEE
        if self.bound is None:
            return Verdict.UNTESTED
        return Verdict.FAIL if self.bound.lower > self.guarantee.epsilon else Verdict.PASS


def measure(
    subject: MeasuredModel,
    guarantee: PrivacyLoss | None,
    *,
    members: Scores,
    heldout: Scores,
    base_members: Scores,
    base_heldout: Scores,
    canaries: Scores | None = None,
    planted: NDArray[np.bool_] | None = None,
    category_tokens: Sequence[int] | None = None,
) -> LeakReport:
    """Assemble the report from teacher-forced scores.

    Args:
        subject: what was measured.
        guarantee: the ledger's epsilon and delta; None or infinite when none is claimed.
        members: training records scored by the tuned model.
        heldout: records of units that were kept out, scored by the tuned model.
        base_members: the same training records scored by the base model.
        base_heldout: the same held-out records scored by the base model.
        canaries: all canaries of the book, labels on the secret alone.
        planted: (m,) their coins.
        category_tokens: of each held-out record, how many leading labels form its category.

    Raises:
        MeasurementError: too few records or canaries, or scores that do not belong together.
        UnaccountableMechanism: the guarantee is not for adding or removing one unit.
    """
    if guarantee is not None and math.isinf(guarantee.epsilon):
        guarantee = None
    if guarantee is not None and guarantee.neighboring is not Neighboring.ADD_OR_REMOVE_ONE:
        raise UnaccountableMechanism(
            f"planting a canary adds one unit: the bound says nothing of {guarantee.neighboring}"
        )
    if (canaries is None) != (planted is None):
        raise MeasurementError("canary scores and coins must be given together")
    quality = Quality(
        member_records=len(members),
        member_loss=members.loss_per_token,
        heldout_records=len(heldout),
        heldout_loss=heldout.loss_per_token,
        base_heldout_loss=base_heldout.loss_per_token,
        heldout_exact_match_rate=float(heldout.exact.mean()),
        base_heldout_exact_match_rate=float(base_heldout.exact.mean()),
        heldout_category_match_rate=(
            None if category_tokens is None else heldout.prefix_match_rate(category_tokens)
        ),
    )
    leak = bound = None
    if canaries is not None and planted is not None:
        leak = canary_leak(canaries, planted)
        delta = 0.0 if guarantee is None else guarantee.delta
        bound = one_run_bound(canary_scores(canaries), planted, delta)
    return LeakReport(
        subject=subject,
        guarantee=guarantee,
        quality=quality,
        records=record_membership(members, heldout, base_members, base_heldout),
        canaries=leak,
        bound=bound,
    )


_ADAPTER: Final = TypeAdapter(LeakReport)


def to_document(report: LeakReport) -> dict[str, Any]:
    """Describe the report as plain JSON values, with its schema and verdict.

    An inversion report is a field only where there is one: reports without are what they were.
    """
    fields: dict[str, Any] = _ADAPTER.dump_python(report, mode="json")
    del fields["inversion"]
    if report.inversion is not None:
        fields["inversion"] = inversion.to_document(report.inversion)
    return {"schema": LEAK_REPORT_SCHEMA, "verdict": str(report.verdict), **fields}


def to_json(report: LeakReport) -> bytes:
    """Encode the report as canonical JSON (RFC 8785)."""
    return rfc8785.dumps(to_document(report))


def from_json(data: bytes) -> LeakReport:
    """Read a report that `to_json` wrote.

    Raises:
        MeasurementError: it is anything else; also a verdict that the numbers do not bear out.
    """
    try:
        report = _ADAPTER.validate_json(data)
        same = to_json(report) == data
    except (ValidationError, rfc8785.CanonicalizationError) as error:
        raise MeasurementError("this is not a leak report") from error
    attacked = report.inversion
    if not same or (attacked is not None and attacked.subject != report.subject):
        raise MeasurementError(
            "this leak report is not what LLMOS wrote: schema, verdict or a field was changed",
            hint="measure the model again",
        )
    return report
