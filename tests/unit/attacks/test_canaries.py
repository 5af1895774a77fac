from __future__ import annotations

import math

import numpy as np
import pytest

from llmos.attacks.canaries import canary_leak, chance_exposure_bits, exposure_bits
from llmos.attacks.scores import Scores
from llmos.errors import MeasurementError


def secrets_scored(losses: list[float], exact: list[bool]) -> Scores:
    tokens = np.full(len(losses), 6, dtype=np.int64)
    return Scores(np.array(losses), tokens, np.where(exact, 6, 2).astype(np.int64))


def test_exposure_is_full_when_ranked_first_and_zero_when_last() -> None:
    reference = np.arange(1.0, 8.0)  # 7 unplanted: 3 bits at most
    assert exposure_bits(np.array([0.5, 3.5, 9.0]), reference) == pytest.approx([3.0, 1.0, 0.0])


def test_a_tied_secret_ranks_behind() -> None:
    assert exposure_bits(np.array([2.0]), np.full(7, 2.0)) == pytest.approx([0.0])


def test_chance_exposure_is_the_mean_over_a_uniform_rank() -> None:
    """Exchangeable losses: the mean over 4000 secrets has standard error 0.02 bits; 5 of them."""
    rng = np.random.default_rng(11)
    drawn = [exposure_bits(rng.random(1), rng.random(47))[0] for _ in range(4000)]
    assert np.mean(drawn) == pytest.approx(chance_exposure_bits(47), abs=0.1)
    mean_log_rank = math.lgamma(49) / math.log(2) / 48  # log2(48!) over 48 ranks
    assert chance_exposure_bits(47) == pytest.approx(math.log2(48) - mean_log_rank)


def test_a_leaking_model() -> None:
    planted = np.array([True, False, True, False, True])
    scored = secrets_scored([0.1, 14.0, 0.2, 13.0, 2.0], [True, False, True, False, False])
    leak = canary_leak(scored, planted)
    assert leak.extraction_rate_planted == pytest.approx(2 / 3)
    assert leak.extraction_rate_unplanted == 0.0
    assert leak.membership.auc == 1.0
    assert leak.mean_exposure_bits == leak.largest_exposure_bits == pytest.approx(math.log2(3))
    assert leak.code_length_bits_unplanted == pytest.approx(13.5 / math.log(2))
    assert leak.code_length_bits_planted == pytest.approx(2.3 / 3 / math.log(2))
    assert leak.losses_nats_planted == (0.1, 0.2, 2.0)
    assert leak.losses_nats_unplanted == (14.0, 13.0)


def test_the_score_is_the_raw_loss_so_lower_is_more_suspect() -> None:
    planted = np.array([True, True, False, False])
    leak = canary_leak(secrets_scored([5.0, 6.0, 1.0, 2.0], [False] * 4), planted)
    assert leak.membership.auc == 0.0


def test_coins_must_fit_and_both_sides_be_there() -> None:
    scored = secrets_scored([1.0, 2.0, 3.0], [False] * 3)
    with pytest.raises(MeasurementError, match="coins"):
        canary_leak(scored, np.array([True, False]))
    with pytest.raises(MeasurementError, match="too few"):
        canary_leak(scored, np.array([True, True, True]))
