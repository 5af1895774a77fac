"""The span check on vectors whose answer is known, and what verdicts are made of."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from llmos.attacks import inversion, observations
from llmos.attacks.inversion import (
    Guess,
    InversionArm,
    InversionReport,
    Observation,
    Uniformity,
    Verdict,
)
from llmos.attacks.leak import MeasuredModel
from llmos.errors import MeasurementError

VOCABULARY, RANK = 500, 8
TOKENS = [3, 77, 123, 499]
RNG = np.random.default_rng(4)
VECTORS = RNG.normal(size=(VOCABULARY, RANK))
VECTORS[7] = 0.0  # a token that leaves no trace is never guessed
GRADIENT = RNG.normal(size=(40, len(TOKENS))) @ VECTORS[TOKENS]
SUBJECT = MeasuredModel("m", "00", "base", "notes", "11")


def distances(observation: Observation, update: NDArray[np.float64]) -> NDArray[np.float64]:
    return inversion.span_distances(observation, [update], [VECTORS], len(TOKENS))


@pytest.mark.parametrize("observation", [Observation.GRADIENT, Observation.MASKED])
def test_the_span_of_a_gradient_has_its_tokens_and_no_others(observation: Observation) -> None:
    found = distances(observation, GRADIENT)
    assert found[TOKENS].max() < 1e-9
    assert np.delete(found, TOKENS).min() > inversion.SPAN_DISTANCE
    assert found[7] == 1.0
    guess = inversion.guess(found, TOKENS)
    assert guess == Guess(hits=4, distinct=4, auc=1.0, candidates=4)


def test_signs_alone_give_the_span_roughly() -> None:
    """The arcsine law is for independent rows: 0.99 with many of them, and never quite exact."""
    rows = np.random.default_rng(5).normal(size=(10_000, len(TOKENS))) @ VECTORS[TOKENS]
    guess = inversion.guess(distances(Observation.SENT, np.sign(rows)), TOKENS)
    assert guess.auc > 0.95
    assert guess.hits >= 1
    exact = inversion.guess(distances(Observation.GRADIENT, np.sign(rows)), TOKENS)
    assert exact.candidates == 0  # the signs' own span is none of four directions


def test_a_layer_that_misses_a_token_is_outvoted() -> None:
    without = np.random.default_rng(6).normal(size=(40, 3)) @ VECTORS[TOKENS[1:]]
    found = inversion.span_distances(
        Observation.GRADIENT, [GRADIENT, without], [VECTORS, VECTORS], len(TOKENS)
    )
    assert inversion.guess(found, TOKENS).hits == 4


@pytest.mark.parametrize(("columns", "distinct"), [(RANK, RANK), (RANK, 0), (RANK - 1, 3)])
def test_what_leaves_no_direction_is_refused(columns: int, distinct: int) -> None:
    with pytest.raises(MeasurementError, match="do not suit vectors of rank 8"):
        inversion.span_distances(Observation.GRADIENT, [GRADIENT[:, :columns]], [VECTORS], distinct)


def test_a_p_value_is_that_of_exchanging_what_was_seen_with_noise() -> None:
    one = Guess(hits=2, distinct=3, auc=0.5, candidates=0)
    arm = inversion.summarise(Observation.SENT, [one], [[0, 0, 1]])
    assert arm.p_value == pytest.approx(1 / 4)  # one of four is as good
    assert arm.chance == pytest.approx(1 / 9)
    two = inversion.summarise(Observation.SENT, [one, one], [[0, 0, 1], [2, 0, 0]])
    assert (two.records, two.tokens) == (2, 6)
    assert two.recall == pytest.approx(4 / 6)
    assert two.p_value == pytest.approx(1 / 4 * 2 / 4)
    none = replace(one, hits=0)
    assert inversion.summarise(Observation.SENT, [none], [[1, 2]]).p_value == 1.0
    with pytest.raises(MeasurementError, match="no record"):
        inversion.summarise(Observation.SENT, [], [])
    with pytest.raises(MeasurementError, match="no record"):
        inversion.summarise(Observation.SENT, [one], [[]])


def arm(observation: Observation, recall: float, p_value: float) -> InversionArm:
    return InversionArm(observation, 1, 10, recall, 0.01, p_value, 0.5, 0.0)


def report(recall: float, masked: float, uniform: float) -> InversionReport:
    return InversionReport(
        subject=SUBJECT,
        parametrisation="ffa",
        rank=8,
        layers=("q",),
        vocabulary=500,
        aggregation="masked",
        noise_multiplier=None,
        clip_norm=None,
        arms=(arm(Observation.GRADIENT, recall, 0.0), arm(Observation.MASKED, 0.0, masked)),
        uniformity=Uniformity(1000, uniform),
    )


@pytest.mark.parametrize(
    ("recall", "masked", "uniform", "verdict"),
    [
        (1.0, 0.3, 0.3, Verdict.PASS),
        (1.0, 1e-7, 0.3, Verdict.FAIL),
        (1.0, 0.3, 1e-7, Verdict.FAIL),
        (0.4, 0.3, 0.3, Verdict.PROVES_NOTHING),
        (0.4, 1e-7, 1e-7, Verdict.PROVES_NOTHING),
    ],
)
def test_a_verdict_needs_an_attack_that_works(
    recall: float, masked: float, uniform: float, verdict: Verdict
) -> None:
    made = report(recall, masked, uniform)
    assert made.verdict is verdict
    assert made.failed == (verdict is Verdict.FAIL)
    assert json.loads(inversion.to_json(made))["verdict"] == verdict
    without = replace(made, arms=made.arms[:1])
    assert without.arm(Observation.MASKED) is None
    assert without.verdict is Verdict.PROVES_NOTHING


def test_integers_with_a_pattern_are_not_uniform() -> None:
    """False alarm of the first line: 1e-6 by the statistic's own law, at a fixed seed."""
    bits, rng = 18, np.random.default_rng(8)
    even = rng.integers(0, 1 << bits, 100_000, dtype=np.uint32)
    assert observations.uniformity([even[:1000], even[1000:]], bits).p_value > 1e-6
    assert observations.uniformity([even], bits).integers == 100_000
    for worse in (even & ~np.uint32(1), even >> np.uint32(1), even // 7 * 7 % (1 << 12)):
        assert observations.uniformity([worse.astype(np.uint32)], bits).p_value < 1e-6
