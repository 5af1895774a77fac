"""What planted secrets betray: extraction, exposure, code length."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmos.attacks.membership import Membership, membership
from llmos.attacks.scores import Scores
from llmos.errors import MeasurementError


@dataclass(frozen=True, slots=True)
class CanaryLeak:
    """How far planted secrets stand out from secrets that were drawn alike and left out.

    The losses of the single canaries are kept: canaries are generated, so they show nobody.
    """

    extraction_rate_planted: float  # secrets that greedy decoding gives back in full
    extraction_rate_unplanted: float
    membership: Membership  # by minus the tuned model's loss on the secret's tokens
    mean_exposure_bits: float
    chance_exposure_bits: float  # what the mean is when planting changes nothing
    largest_exposure_bits: float  # log2(unplanted + 1), when every planted one ranks first
    code_length_bits_planted: float  # mean of -log2 p(secret)
    code_length_bits_unplanted: float
    losses_nats_planted: tuple[float, ...]
    losses_nats_unplanted: tuple[float, ...]


def canary_scores(canaries: Scores) -> NDArray[np.float64]:
    """Return (m,) the score fixed beforehand: minus the tuned model's raw loss on the secret.

    Canaries are exchangeable, so the base model's loss says nothing about the coins: subtracting it
    would only add noise.
    """
    return -canaries.loss_nats


def exposure_bits(
    planted_loss: NDArray[np.float64], unplanted_loss: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return (planted,) log2(n + 1) - log2(rank) of each planted secret among n unplanted ones.

    A tie ranks behind. Source: Carlini et al. 2019, arXiv:1802.08232, section 4.2, with the
    unplanted canaries as the reference set.
    """
    reference = np.sort(unplanted_loss)
    rank = 1 + np.searchsorted(reference, planted_loss, side="right")
    return np.asarray(math.log2(len(reference) + 1) - np.log2(rank), dtype=np.float64)


def chance_exposure_bits(unplanted: int) -> float:
    """Return the mean exposure of a secret whose rank among `unplanted` others is uniform."""
    return math.log2(unplanted + 1) - float(np.log2(np.arange(1, unplanted + 2)).mean())


def canary_leak(canaries: Scores, planted: NDArray[np.bool_]) -> CanaryLeak:
    """Compare planted with unplanted canaries, scored on the secret's tokens alone.

    Raises:
        MeasurementError: the coins do not fit the scores, or one side has fewer than two canaries.
    """
    if planted.shape != (len(canaries),):
        raise MeasurementError(f"{len(canaries)} canary scores for {planted.shape} coins")
    inside, outside = canaries.select(planted), canaries.select(~planted)
    score = canary_scores(canaries)
    attack = membership(score[planted], score[~planted])
    return CanaryLeak(
        extraction_rate_planted=float(inside.exact.mean()),
        extraction_rate_unplanted=float(outside.exact.mean()),
        membership=attack,
        mean_exposure_bits=float(exposure_bits(inside.loss_nats, outside.loss_nats).mean()),
        chance_exposure_bits=chance_exposure_bits(len(outside)),
        largest_exposure_bits=math.log2(len(outside) + 1),
        code_length_bits_planted=float(inside.loss_nats.mean() / math.log(2)),
        code_length_bits_unplanted=float(outside.loss_nats.mean() / math.log(2)),
        losses_nats_planted=tuple(inside.loss_nats.tolist()),
        losses_nats_unplanted=tuple(outside.loss_nats.tolist()),
    )
