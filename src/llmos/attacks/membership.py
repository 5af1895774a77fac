"""Membership inference: telling training records from records that the model never saw."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from llmos.attacks.scores import Scores
from llmos.errors import MeasurementError

FALSE_POSITIVE_RATE: Final = 0.01
FEWEST_NONMEMBERS: Final = 100  # below, "1 % false positives" would mean none at all

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Membership:
    """How well one score tells members from non-members; 0.5 is chance."""

    auc: float
    auc_standard_error: float  # DeLong; 0 where the two do not overlap
    tpr_at_1_percent_fpr: float | None  # None under 100 non-members
    members: int
    nonmembers: int


@dataclass(frozen=True, slots=True)
class RecordMembership:
    """The attack on natural records by both scores; which one leads was fixed before measuring.

    Natural records differ in difficulty, which the base model's loss takes away: so
    `base_minus_tuned` is the headline (arXiv:2402.17012), and `raw_loss` stands beside it.
    """

    base_minus_tuned: Membership
    raw_loss: Membership

    @property
    def headline(self) -> Membership:
        """Return the attack that was named beforehand."""
        return self.base_minus_tuned


def auc(members: Values, nonmembers: Values) -> tuple[float, float]:
    """Return the area under the ROC curve, ties counted half, and its standard error.

    Source: DeLong, DeLong, Clarke-Pearson 1988, through midranks (Sun, Xu 2014).

    Raises:
        MeasurementError: fewer than two members or non-members, or a score that is not a number.
    """
    m, n = len(members), len(nonmembers)
    if min(m, n) < 2:  # noqa: PLR2004 - a variance needs two values
        raise MeasurementError(f"{m} members and {n} non-members are too few to compare")
    both = np.concatenate([members, nonmembers])
    if np.isnan(both).any():
        raise MeasurementError("a record's score is not a number")
    ranks = rankdata(both)
    above = (ranks[:m] - rankdata(members)) / n  # (m,) share of non-members below each member
    below = 1 - (ranks[m:] - rankdata(nonmembers)) / m  # (n,) share of members above each
    variance = float(np.var(above, ddof=1) / m + np.var(below, ddof=1) / n)
    return float(above.mean()), math.sqrt(variance)


def tpr_at_1_percent_fpr(members: Values, nonmembers: Values) -> float | None:
    """Return the share of members found while at most 1 % of non-members are accused."""
    if len(nonmembers) < FEWEST_NONMEMBERS:
        return None
    accused = math.floor(FALSE_POSITIVE_RATE * len(nonmembers))
    threshold = np.sort(nonmembers)[::-1][accused]
    return float((members > threshold).mean())


def membership(members: Values, nonmembers: Values) -> Membership:
    """Attack with one score per record, higher meaning more likely a member."""
    area, standard_error = auc(members, nonmembers)
    return Membership(
        auc=area,
        auc_standard_error=standard_error,
        tpr_at_1_percent_fpr=tpr_at_1_percent_fpr(members, nonmembers),
        members=len(members),
        nonmembers=len(nonmembers),
    )


def record_membership(
    members: Scores, heldout: Scores, base_members: Scores, base_heldout: Scores
) -> RecordMembership:
    """Attack natural records by the tuned model's loss per token and by its gain over the base."""
    tuned_in, tuned_out = members.mean_loss_nats, heldout.mean_loss_nats
    base_in, base_out = base_members.mean_loss_nats, base_heldout.mean_loss_nats
    if tuned_in.shape != base_in.shape or tuned_out.shape != base_out.shape:
        raise MeasurementError("the base model was scored on other records than the tuned one")
    return RecordMembership(
        base_minus_tuned=membership(base_in - tuned_in, base_out - tuned_out),
        raw_loss=membership(-tuned_in, -tuned_out),
    )
