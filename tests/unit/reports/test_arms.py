from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.reports.conftest import with_inversion

from llmos.attacks import inversion, leak
from llmos.errors import MeasurementError
from llmos.privacy import PrivacyLoss
from llmos.reports import arms, inversions
from llmos.reports.arms import at_least, at_most, read_arm

Documents = Callable[..., dict[str, Any]]


def test_what_the_measurement_writes_is_read(make_document: Documents, loss: PrivacyLoss) -> None:
    document = make_document("m", loss, leaking=True)
    arm = read_arm(document)
    report = leak.from_json(rfc8785.dumps(document))
    assert report.canaries is not None
    assert report.bound is not None
    assert arm.secrets is not None
    assert (arm.model, arm.epsilon, arm.delta) == (report.model, loss.epsilon, loss.delta)
    assert (arm.verdict, arm.epsilon_lower) == (str(report.verdict), report.bound.lower)
    assert arm.records.auc == report.records.headline.auc
    assert arm.secrets.code_length_bits_planted[0] == pytest.approx(
        report.canaries.losses_nats_planted[0] / math.log(2)
    )
    assert arm.heldout_perplexity == report.quality.heldout_perplexity
    assert arm.report_sha256 == hashlib.sha256(leak.to_json(report)).hexdigest()
    assert arm.label == "m (ε ≤ 1.08)"
    assert leak.LEAK_REPORT_SCHEMA == arms.LEAK_REPORT_SCHEMA


def test_the_schema_and_every_kind_of_observation_have_their_words() -> None:
    assert inversions.INVERSION_SCHEMA == inversion.INVERSION_SCHEMA
    assert set(inversions.SEEN) == {str(kind) for kind in inversion.Observation}
    assert set(inversions.MEANING) == {str(verdict) for verdict in inversion.Verdict}


@pytest.mark.parametrize(
    "change", [{"schema": "llmos.inversion-report/v2"}, {"verdict": "good"}, {"sample": None}]
)
def test_what_is_no_inversion_report_is_named(
    make_document: Documents, change: dict[str, Any]
) -> None:
    document = with_inversion(make_document("m", None, leaking=False))
    document["inversion"] = {**document["inversion"], **change}
    with pytest.raises(MeasurementError, match="lacks or misuses a field"):
        read_arm(document)


def test_no_guarantee_and_no_canaries(make_document: Documents) -> None:
    arm = read_arm(make_document("m", None, leaking=False, canaries=False))
    assert (arm.secrets, arm.epsilon, arm.epsilon_lower) == (None, None, None)
    assert arm.label == "m (no guarantee)"


def test_a_boundless_loss_is_shown_as_infinite(make_document: Documents) -> None:
    document = make_document("m", None, leaking=False)
    document["quality"] = {**document["quality"], "heldout_loss": 5000.0}
    assert read_arm(document).heldout_perplexity == math.inf


@given(st.floats(0, 1e4))
def test_bounds_are_never_rounded_to_the_better_side(value: float) -> None:
    assert float(at_most(value)) >= value - 1e-9
    assert float(at_least(value)) <= value + 1e-9


@pytest.mark.parametrize("field", ["subject", "quality", "records", "bound"])
def test_a_missing_field_is_named(make_document: Documents, field: str) -> None:
    document = make_document("m", None, leaking=False)
    del document[field]
    with pytest.raises(MeasurementError, match=field):
        read_arm(document)
