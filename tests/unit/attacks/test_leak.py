from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import rfc8785

from llmos.attacks import inversion
from llmos.attacks.inversion import (
    InversionArm,
    InversionReport,
    Observation,
    Sample,
    Uniformity,
)
from llmos.attacks.leak import (
    LEAK_REPORT_SCHEMA,
    LeakReport,
    Verdict,
    from_json,
    measure,
    to_document,
    to_json,
)
from llmos.attacks.scores import Scores
from llmos.attacks.subject import MeasuredModel
from llmos.errors import MeasurementError, UnaccountableMechanism
from llmos.privacy import Neighboring, PrivacyLoss, PrivacyUnit

MODEL = MeasuredModel("ward", "ab" * 32, "smollm2-135m", "notes", "cd" * 32)
UNIT = PrivacyUnit("patient_id")


def scored(losses: np.ndarray, exact: np.ndarray | None = None) -> Scores:
    tokens = np.full(len(losses), 6, dtype=np.int64)
    prefix = np.zeros_like(tokens) if exact is None else np.where(exact, 6, 2)
    return Scores(losses.astype(float), tokens, prefix.astype(np.int64))


def report(guarantee: PrivacyLoss | None, *, leaking: bool, canaries: bool = True) -> LeakReport:
    rng = np.random.default_rng(1)
    planted = np.arange(100) % 2 == 0
    secrets = 14 + rng.normal(0, 1, 100) - (12 * planted if leaking else 0)
    records = rng.normal(20, 1, 30)
    return measure(
        MODEL,
        guarantee,
        members=scored(records),
        heldout=scored(records + 1, np.arange(30) < 6),
        base_members=scored(records + 9),
        base_heldout=scored(records + 9),
        canaries=scored(secrets, secrets < 5) if canaries else None,
        planted=planted if canaries else None,
        category_tokens=[2] * 30,
    )


def test_a_leak_that_the_ledger_rules_out_fails() -> None:
    found = report(PrivacyLoss(1.0, 1e-5, UNIT), leaking=True)
    assert found.bound is not None
    assert found.bound.lower > 2.7
    assert found.bound.delta == 1e-5
    assert found.verdict is Verdict.FAIL
    assert found.failed
    assert (found.model, found.epsilon_ledger) == ("ward", 1.0)
    assert found.canaries is not None
    assert found.canaries.extraction_rate_planted == 1.0


def test_what_the_ledger_allows_passes() -> None:
    assert report(PrivacyLoss(8.0, 1e-5, UNIT), leaking=True).verdict is Verdict.PASS
    assert report(PrivacyLoss(1.0, 1e-5, UNIT), leaking=False).verdict is Verdict.PASS


@pytest.mark.parametrize("guarantee", [None, PrivacyLoss(math.inf, 0.0, UNIT)])
def test_without_a_guarantee_nothing_fails_and_nothing_passes(
    guarantee: PrivacyLoss | None,
) -> None:
    found = report(guarantee, leaking=True)
    assert found.verdict is Verdict.NO_GUARANTEE
    assert found.epsilon_ledger is None
    assert not found.failed


def test_without_canaries_a_guarantee_is_untested() -> None:
    found = report(PrivacyLoss(1.0, 1e-5, UNIT), leaking=True, canaries=False)
    assert found.verdict is Verdict.UNTESTED
    assert from_json(to_json(found)) == found


def test_a_bound_on_added_canaries_says_nothing_of_replaced_units() -> None:
    with pytest.raises(UnaccountableMechanism, match="replace-one"):
        report(PrivacyLoss(1.0, 1e-5, UNIT, Neighboring.REPLACE_ONE), leaking=False)


def test_quality_figures() -> None:
    quality = report(None, leaking=False).quality
    assert (quality.member_records, quality.heldout_records) == (30, 30)
    assert quality.heldout_exact_match_rate == 0.2
    assert quality.heldout_category_match_rate == 1.0  # every record has two right tokens
    assert quality.heldout_perplexity == pytest.approx(math.exp(quality.heldout_loss))
    assert quality.base_heldout_perplexity > quality.heldout_perplexity
    assert replace(quality, heldout_loss=1e4).heldout_perplexity == math.inf


def test_json_goes_both_ways() -> None:
    found = report(PrivacyLoss(1.0, 1e-5, UNIT), leaking=True)
    document = json.loads(to_json(found))
    assert document == json.loads(json.dumps(to_document(found)))
    assert (document["schema"], document["verdict"]) == (LEAK_REPORT_SCHEMA, "fail")
    assert from_json(to_json(found)) == found


def inverted(subject: MeasuredModel = MODEL) -> InversionReport:
    return InversionReport(
        subject=subject,
        sample=Sample(offered=8, used=8, cut_to=15),
        parametrisation="ffa",
        rank=16,
        layers=("q",),
        vocabulary=500,
        aggregation="masked",
        noise_multiplier=None,
        clip_norm=None,
        arms=(InversionArm(Observation.MASKED, 8, 90, 0.5, 0.01, 1e-9, 0.9, 40.0),),
        uniformity=Uniformity(1000, 0.5),
    )


def test_a_report_without_an_attack_on_messages_is_what_it_was() -> None:
    """Hashes that were certified before there were inversion reports stay valid."""
    found = report(PrivacyLoss(1.0, 1e-5, UNIT), leaking=True)
    fields = {"subject", "guarantee", "quality", "records", "canaries", "bound"}
    assert set(to_document(found)) == fields | {"schema", "verdict"}


def test_an_attack_on_messages_is_part_of_the_report() -> None:
    found = replace(report(PrivacyLoss(1.0, 1e-5, UNIT), leaking=True), inversion=inverted())
    document = json.loads(to_json(found))
    assert document["inversion"] == inversion.to_document(inverted())
    assert (document["verdict"], document["inversion"]["verdict"]) == ("fail", "fail")
    assert from_json(to_json(found)) == found


@pytest.mark.parametrize(
    "change",
    [{"verdict": "pass"}, {"schema": "llmos.inversion-report/v2"}, {"rank": "16"}, {"extra": 1}],
)
def test_a_changed_attack_in_a_report_is_refused(change: dict[str, Any]) -> None:
    document = to_document(replace(report(None, leaking=False), inversion=inverted()))
    document["inversion"] = {**document["inversion"], **change}
    with pytest.raises(MeasurementError, match="not what LLMOS wrote"):
        from_json(rfc8785.dumps(document))


def test_null_is_no_attack_and_one_on_another_model_is_refused() -> None:
    found = report(None, leaking=False)
    other = replace(found, inversion=inverted(replace(MODEL, digest="ef" * 32)))
    for data in (rfc8785.dumps({**to_document(found), "inversion": None}), to_json(other)):
        with pytest.raises(MeasurementError, match="not what LLMOS wrote"):
            from_json(data)


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": "pass"},
        {"schema": "llmos.leak-report/v2"},
        {"extra": 1},
        {"bound": {"lower": 0.0}},
        {"guarantee": None},
    ],
)
def test_a_changed_report_is_refused(change: dict[str, Any]) -> None:
    document = {**to_document(report(PrivacyLoss(1.0, 1e-5, UNIT), leaking=True)), **change}
    with pytest.raises(MeasurementError):
        from_json(rfc8785.dumps(document))


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"\xff\xfe", b"null"])
def test_what_is_no_report_is_refused(data: bytes) -> None:
    with pytest.raises(MeasurementError):
        from_json(data)


def test_coins_without_scores_are_refused() -> None:
    records = scored(np.ones(5))
    with pytest.raises(MeasurementError, match="together"):
        measure(
            MODEL,
            None,
            members=records,
            heldout=records,
            base_members=records,
            base_heldout=records,
            planted=np.array([True]),
        )
