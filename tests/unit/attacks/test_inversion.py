"""The span check on vectors whose answer is known, and what verdicts are made of."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import rfc8785
from numpy.typing import NDArray

from llmos.attacks import inversion, observations
from llmos.attacks.inversion import (
    Guess,
    InversionArm,
    InversionReport,
    Observation,
    Sample,
    Uniformity,
    Verdict,
)
from llmos.attacks.subject import MeasuredModel
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


def report(
    recall: float, masked: float, uniform: float, *, unmasked: float = 0.0
) -> InversionReport:
    return InversionReport(
        subject=SUBJECT,
        sample=Sample(offered=9, used=8, cut_to=7),
        parametrisation="ffa",
        rank=8,
        layers=("q",),
        vocabulary=500,
        aggregation="masked",
        noise_multiplier=None,
        clip_norm=None,
        arms=(
            arm(Observation.GRADIENT, recall, 0.0),
            arm(Observation.UNMASKED, 0.9, unmasked),
            arm(Observation.MASKED, 0.0, masked),
        ),
        uniformity=Uniformity(1000, uniform),
    )


@pytest.mark.parametrize(
    ("made", "verdict"),
    [
        (report(1.0, 0.3, 0.3), Verdict.PASS),
        (report(1.0, 1e-7, 0.3), Verdict.FAIL),
        (report(1.0, 0.3, 1e-7), Verdict.FAIL),
        # What is seen behind a mask is seen, whatever else the attack can do.
        (report(0.4, 0.3, 1e-300), Verdict.FAIL),
        (report(0.4, 1e-7, 0.3), Verdict.FAIL),
        (replace(report(1.0, 0.3, 1e-7), arms=()), Verdict.FAIL),
        # That nothing is seen says something only where it would be without a mask.
        (report(0.4, 0.3, 0.3), Verdict.PROVES_NOTHING),
        (report(1.0, 0.3, 0.3, unmasked=1e-5), Verdict.PROVES_NOTHING),
        (replace(report(1.0, 0.3, 0.3), aggregation="plain"), Verdict.NO_MASKS),
        (replace(report(0.4, 0.3, 0.3), aggregation="plain"), Verdict.NO_MASKS),
        (replace(report(1.0, 0.3, 1e-7), aggregation="plain"), Verdict.FAIL),
    ],
)
def test_a_pass_needs_an_attack_that_works_and_a_fail_needs_none(
    made: InversionReport, verdict: Verdict
) -> None:
    assert made.verdict is verdict
    assert made.failed == (verdict is Verdict.FAIL)
    assert json.loads(inversion.to_json(made))["verdict"] == verdict


@pytest.mark.parametrize("missing", range(3))
def test_without_one_of_its_arms_nothing_passes(missing: int) -> None:
    made = report(1.0, 0.3, 0.3)
    arms = tuple(one for place, one in enumerate(made.arms) if place != missing)
    assert replace(made, arms=arms).verdict is Verdict.PROVES_NOTHING


def test_what_the_coordinator_sees_is_named() -> None:
    masked = report(1.0, 0.3, 0.3)
    plain = replace(masked, aggregation="plain")
    private = replace(plain, noise_multiplier=1.0, clip_norm=1.0)
    seen = [
        json.loads(inversion.to_json(one))["coordinator_sees"] for one in (masked, plain, private)
    ]
    assert seen == ["masked", "sent", "private"]


@pytest.mark.parametrize(("used", "can_fail"), [(4, False), (5, True), (8, True)])
def test_it_is_said_whether_the_guesses_could_fail_the_masks(used: int, can_fail: bool) -> None:
    best = Guess(hits=2, distinct=2, auc=1.0, candidates=2)
    noise = [[0] * inversion.DRAWS] * used
    found = inversion.summarise(Observation.MASKED, [best] * used, noise)
    assert (found.p_value < inversion.FALSE_ALARM) == can_fail
    made = replace(report(1.0, 0.3, 0.3), sample=Sample(offered=9, used=used, cut_to=7))
    said = json.loads(inversion.to_json(made))
    assert said["guesses_can_fail"] == can_fail
    assert said["sample"] == {"offered": 9, "used": used, "cut_to": 7}


def test_json_goes_both_ways() -> None:
    for made in (report(1.0, 0.3, 0.3), report(1.0, 1e-7, 0.3), report(0.0, 0.3, 0.3)):
        assert inversion.from_json(inversion.to_json(made)) == made


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": "pass"},
        {"schema": "llmos.inversion-report/v2"},
        {"coordinator_sees": "private"},
        {"guesses_can_fail": False},
        {"aggregation": "none"},
        {"extra": 1},
        {"arms": []},
        {"rank": "8"},
    ],
)
def test_a_changed_report_is_refused(change: dict[str, Any]) -> None:
    document = {**inversion.to_document(report(1.0, 1e-7, 0.3)), **change}
    with pytest.raises(MeasurementError):
        inversion.from_json(rfc8785.dumps(document))


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"\xff\xfe", b"null"])
def test_what_is_no_report_is_refused(data: bytes) -> None:
    with pytest.raises(MeasurementError, match="not an inversion report"):
        inversion.from_json(data)


def test_integers_with_a_pattern_are_not_uniform() -> None:
    """False alarm of the first line: 1e-6 by the statistic's own law, at a fixed seed."""
    bits, rng = 18, np.random.default_rng(8)
    even = rng.integers(0, 1 << bits, 100_000, dtype=np.uint32)
    assert observations.uniformity([even[:1000], even[1000:]], bits).p_value > 1e-6
    assert observations.uniformity([even], bits).integers == 100_000
    for worse in (even & ~np.uint32(1), even >> np.uint32(1), even // 7 * 7 % (1 << 12)):
        assert observations.uniformity([worse.astype(np.uint32)], bits).p_value < 1e-6
