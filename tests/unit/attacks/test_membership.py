from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.attacks.membership import auc, membership, record_membership, tpr_at_1_percent_fpr
from llmos.attacks.scores import Scores
from llmos.errors import MeasurementError

SCORES = st.lists(st.integers(-5, 5), min_size=2, max_size=20).map(
    lambda values: np.array(values, dtype=float)
)


def scores_of(mean_losses: np.ndarray, tokens: int = 4) -> Scores:
    count = np.full(len(mean_losses), tokens, dtype=np.int64)
    return Scores(mean_losses * tokens, count, np.zeros_like(count))


@settings(deadline=None, max_examples=50)
@given(SCORES, SCORES)
def test_auc_is_the_share_of_pairs_in_the_right_order_with_ties_half(
    members: np.ndarray, nonmembers: np.ndarray
) -> None:
    pairs = members[:, None] - nonmembers[None]
    expected = (pairs > 0).mean() + 0.5 * (pairs == 0).mean()
    assert auc(members, nonmembers)[0] == pytest.approx(expected)


@settings(deadline=None, max_examples=50)
@given(SCORES, SCORES)
def test_the_standard_error_is_delong(members: np.ndarray, nonmembers: np.ndarray) -> None:
    pairs = members[:, None] - nonmembers[None]
    kernel = (pairs > 0) + 0.5 * (pairs == 0)
    expected = math.sqrt(
        kernel.mean(axis=1).var(ddof=1) / len(members)
        + kernel.mean(axis=0).var(ddof=1) / len(nonmembers)
    )
    assert auc(members, nonmembers)[1] == pytest.approx(expected, abs=1e-12)


def test_the_standard_error_covers_the_truth() -> None:
    """Normal scores one apart: the true AUC is Phi(1/sqrt 2) = 0.7602.

    200 runs, each covered with chance about 0.95; fewer than 175 has chance below 1e-4.
    """
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(200):
        area, error = auc(rng.normal(1, 1, 60), rng.normal(0, 1, 60))
        covered += abs(area - 0.7602) < 1.96 * error
    assert covered >= 175


def test_tpr_needs_a_hundred_nonmembers() -> None:
    rng = np.random.default_rng(3)
    members = np.array([5.0, 5.0, -5.0, -5.0])
    assert tpr_at_1_percent_fpr(members, rng.random(99)) is None
    assert tpr_at_1_percent_fpr(members, rng.random(100)) == 0.5


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 8), min_size=100, max_size=250))
def test_tpr_never_accuses_more_than_one_percent_of_nonmembers(values: list[int]) -> None:
    nonmembers = np.array(values, dtype=float)
    rate = tpr_at_1_percent_fpr(nonmembers, nonmembers)  # attacked with themselves: TPR = FPR
    assert rate is not None
    assert rate <= 0.01


def test_counts_stand_beside_the_figures() -> None:
    result = membership(np.array([2.0, 3.0]), np.array([0.0, 1.0, 1.5]))
    assert (result.members, result.nonmembers) == (2, 3)
    assert (result.auc, result.tpr_at_1_percent_fpr) == (1.0, None)


def test_the_headline_takes_the_difficulty_of_a_record_away() -> None:
    difficulty = np.linspace(1, 10, 40)
    gain = 0.5
    result = record_membership(
        members=scores_of(difficulty - gain),
        heldout=scores_of(difficulty),
        base_members=scores_of(difficulty),
        base_heldout=scores_of(difficulty),
    )
    assert result.headline is result.base_minus_tuned
    assert result.base_minus_tuned.auc == 1.0
    assert 0.5 < result.raw_loss.auc < 0.6


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(MeasurementError, match="too few"):
        auc(np.array([1.0]), np.array([1.0, 2.0]))
    with pytest.raises(MeasurementError, match="not a number"):
        auc(np.array([1.0, math.nan]), np.array([1.0, 2.0]))
    some = scores_of(np.ones(3))
    with pytest.raises(MeasurementError, match="other records"):
        record_membership(some, some, scores_of(np.ones(4)), some)
