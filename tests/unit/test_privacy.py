from __future__ import annotations

import json
import math
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from llmos.errors import InvalidPrivacyParameter, UnaccountableMechanism
from llmos.privacy import (
    MECHANISM_SCHEMA,
    Neighboring,
    PoissonSampledGaussian,
    PrivacyLoss,
    PrivacyUnit,
    check_delta,
    check_epsilon,
    mechanism_from_dict,
    mechanism_to_dict,
)

PATIENT = PrivacyUnit("patient_id")
MECHANISMS = st.builds(
    PoissonSampledGaussian,
    sampling_probability=st.floats(0, 1, exclude_min=True),
    noise_multiplier=st.floats(0, 1e300, exclude_min=True),
    steps=st.integers(0, 2**53 - 1),  # the whole numbers that RFC 8785 can write
)
WRITTEN: dict[str, Any] = {
    "schema": MECHANISM_SCHEMA,
    "type": "poisson-sampled-gaussian",
    "sampling_probability": 0.05,
    "noise_multiplier": 4.0,
    "steps": 200,
}


@given(mechanism=MECHANISMS)
def test_a_mechanism_survives_canonical_json(mechanism: PoissonSampledGaussian) -> None:
    text = rfc8785.dumps(dict(mechanism_to_dict(mechanism)))
    again = mechanism_from_dict(json.loads(text))
    assert again == mechanism
    assert isinstance(again.sampling_probability, float)
    assert isinstance(again.noise_multiplier, float)
    assert rfc8785.dumps(dict(mechanism_to_dict(again))) == text


def test_the_written_form_of_a_mechanism_is_fixed() -> None:
    assert mechanism_to_dict(PoissonSampledGaussian(0.05, 4.0, 200)) == WRITTEN


@pytest.mark.parametrize(
    "changed",
    [
        {"schema": "llmos.mechanism/v2"},
        {"type": "laplace"},
        {"sampling_probability": "0.05"},
        {"noise_multiplier": None},
        {"noise_multiplier": True},
        {"noise_multiplier": 10**400},
        {"steps": 200.5},
        {"steps": True},
        {"steps": [200]},
        {"clip_norm": 1.0},
    ],
    ids=str,
)
def test_an_unknown_description_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(UnaccountableMechanism, match="unknown mechanism"):
        mechanism_from_dict({**WRITTEN, **changed})


@pytest.mark.parametrize("missing", sorted(WRITTEN))
def test_a_description_with_a_field_missing_is_refused(missing: str) -> None:
    fields = {name: value for name, value in WRITTEN.items() if name != missing}
    with pytest.raises(UnaccountableMechanism):
        mechanism_from_dict(fields)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("sampling_probability", value) for value in (0.0, -0.1, 1.0001, math.inf, math.nan)),
        *(("noise_multiplier", value) for value in (0.0, -1.0, math.inf, -math.inf, math.nan)),
        *(("steps", value) for value in (-1, 0.5, math.nan, math.inf)),
    ],
)
def test_parameters_without_a_theorem_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidPrivacyParameter) as refused:
        PoissonSampledGaussian(
            **{"sampling_probability": 0.05, "noise_multiplier": 4.0, "steps": 200, name: value}
        )
    assert refused.value.name == name
    assert refused.value.value is value
    assert name in refused.value.message


@pytest.mark.parametrize("name", ["sampling_probability", "noise_multiplier"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 0])
def test_a_description_does_not_get_around_the_ranges(name: str, value: float) -> None:
    with pytest.raises(InvalidPrivacyParameter):
        mechanism_from_dict({**WRITTEN, name: value})


def test_the_edges_of_the_ranges_are_allowed() -> None:
    assert PoissonSampledGaussian(1.0, 1e-9, 0).steps == 0


def test_after_changes_only_the_steps() -> None:
    planned = PoissonSampledGaussian(0.05, 4.0, 200)
    assert planned.after(7) == PoissonSampledGaussian(0.05, 4.0, 7)
    with pytest.raises(InvalidPrivacyParameter):
        planned.after(-1)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.inf, math.nan])
def test_an_epsilon_to_aim_for_is_finite_and_above_zero(epsilon: float) -> None:
    with pytest.raises(InvalidPrivacyParameter, match="epsilon"):
        check_epsilon(epsilon)
    assert check_epsilon(0.5) == 0.5


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-9, math.inf, math.nan])
def test_a_delta_to_aim_for_lies_strictly_between_zero_and_one(delta: float) -> None:
    with pytest.raises(InvalidPrivacyParameter, match="delta"):
        check_delta(delta)
    assert check_delta(1e-5) == 1e-5


@pytest.mark.parametrize(
    ("epsilon", "delta"),
    [(-0.1, 0.0), (math.nan, 0.0), (1.0, -0.1), (1.0, 1.0), (1.0, math.nan)],
)
def test_a_loss_that_is_no_guarantee_is_refused(epsilon: float, delta: float) -> None:
    with pytest.raises(InvalidPrivacyParameter):
        PrivacyLoss(epsilon, delta, PATIENT)


def test_a_unit_has_a_column() -> None:
    with pytest.raises(InvalidPrivacyParameter, match="unit must be the name of a column"):
        PrivacyUnit("")


@pytest.mark.parametrize(
    ("epsilon", "delta", "fits"),
    [(3.0, 1e-5, True), (2.0, 0.0, True), (3.1, 0.0, False), (1.0, 1e-4, False)],
)
def test_a_loss_is_within_a_limit_when_both_parts_are(
    epsilon: float, delta: float, fits: bool
) -> None:
    limit = PrivacyLoss(3.0, 1e-5, PATIENT)
    assert PrivacyLoss(epsilon, delta, PATIENT).within(limit) is fits


def test_no_finite_limit_holds_an_infinite_loss() -> None:
    infinite = PrivacyLoss(math.inf, 0.0, PATIENT)
    assert not infinite.within(PrivacyLoss(1e9, 0.5, PATIENT))
    assert infinite.within(infinite)


@pytest.mark.parametrize(
    "limit",
    [
        PrivacyLoss(9.0, 0.1, PrivacyUnit("visit_id")),
        PrivacyLoss(9.0, 0.1, PATIENT, Neighboring.REPLACE_ONE),
    ],
    ids=["unit", "adjacency"],
)
def test_losses_of_different_kinds_are_never_compared(limit: PrivacyLoss) -> None:
    with pytest.raises(UnaccountableMechanism, match="cannot be compared"):
        PrivacyLoss(1.0, 0.0, PATIENT).within(limit)


def test_losses_cannot_be_added() -> None:
    assert not hasattr(PrivacyLoss, "__add__")
