from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from tests.unit.reports.conftest import ALL_ANSWERS, SIGNED

from llmos.reports.facts import CertificateFacts
from llmos.reports.registry import SCHEMA
from llmos.reports.verification import verify_bundle

VECTOR = Path(__file__).parents[2] / "vectors" / "deployments_registry.json"
SCHEMA_FILE = json.loads(VECTOR.read_text())
VALIDATOR = Draft202012Validator(SCHEMA_FILE, format_checker=Draft202012Validator.FORMAT_CHECKER)
TIER_1 = {"curator", "curator-type", "intended-use", "region", "sector"}
TIER_3 = {"unit", "operator", "actors", "preparation", "justification"}
Registry = Callable[[set[str]], dict[str, Any]]


@pytest.fixture
def registry(
    facts: CertificateFacts, make_bundle: Callable[..., bytes], public_keys: str
) -> Registry:
    """Return a function that certifies with some answers and returns the registry section."""

    def made(answered: set[str]) -> dict[str, Any]:
        answers = {name: answer for name, answer in ALL_ANSWERS.items() if name in answered}
        certificate = make_bundle(replace(facts, answers=answers))
        section: dict[str, Any] = verify_bundle(certificate, public_keys).predicate["registry"]
        return section

    return made


def test_our_schema_names_where_its_form_comes_from() -> None:
    assert SCHEMA["commit"] in SCHEMA_FILE["$comment"]
    assert SCHEMA["path"] in SCHEMA_FILE["$comment"]
    Draft202012Validator.check_schema(SCHEMA_FILE)


def test_with_every_answer_tier_3_is_complete_and_fits_the_registry(registry: Registry) -> None:
    made = registry(TIER_1 | TIER_3)
    assert (made["tier"], made["complete"], made["missing"]) == (3, True, [])
    assert made["record"]["deployment"]["administrative"]["tier"] == 3
    assert [error.message for error in VALIDATOR.iter_errors(made["record"])] == []
    wanted = {
        f"/deployment/{group}/{name}"
        for group, fields in SCHEMA_FILE["properties"]["deployment"]["properties"].items()
        for name, field in fields["properties"].items()
        if field.get("tier") is not None
    }
    assert wanted - {field["path"] for field in made["fields"]} == UNUSED


# Fields that the registry marks as optional in words ("if necessary", "not sure where to move").
UNUSED = {
    "/deployment/deployment_model/model_name_details",
    "/deployment/implementation/additional_information",
    "/deployment/administrative/evidence_sources",  # filled, and no field of the deployment
}


@pytest.mark.parametrize("question", sorted(TIER_1))
def test_without_an_answer_of_tier_1_there_is_no_tier(registry: Registry, question: str) -> None:
    made = registry((TIER_1 | TIER_3) - {question})
    assert (made["tier"], made["complete"], made["missing"]) == (0, False, [question])
    assert "tier" not in made["record"]["deployment"]["administrative"]
    assert list(VALIDATOR.iter_errors(made["record"]))


@pytest.mark.parametrize("question", sorted(TIER_3))
def test_without_an_answer_of_tier_3_it_is_tier_2(registry: Registry, question: str) -> None:
    made = registry((TIER_1 | TIER_3) - {question})
    assert (made["tier"], made["complete"], made["missing"]) == (2, False, [question])
    assert not list(VALIDATOR.iter_errors(made["record"]))


def test_each_field_says_who_stands_for_it(registry: Registry) -> None:
    made = registry(TIER_1 | {"unit"})
    by = {field["path"]: field["by"] for field in made["fields"]}
    assert by["/deployment/privacy_loss/privacy_parameters"] == "system"
    assert by["/deployment/basic/data_curators"] == "person"
    assert by["/deployment/privacy_loss/privacy_unit_details"] == "person"
    assert by["/deployment/implementation/justification"] == "open"
    people = {name for field in made["fields"] for name in field["people"]}
    assert people == {SIGNED}
    assert made["record"]["deployment"]["administrative"]["registry_authors"] == [SIGNED]
    details = made["record"]["deployment"]["privacy_loss"]["privacy_unit_details"]
    assert details.endswith(f"On unit. ({SIGNED})")


def test_figures_are_the_certificates_own(registry: Registry, facts: CertificateFacts) -> None:
    deployment = registry(TIER_1 | TIER_3)["record"]["deployment"]
    loss = facts.guarantee.loss
    assert deployment["privacy_loss"]["privacy_parameters"]["epsilon"] == loss.epsilon
    assert deployment["privacy_loss"]["privacy_parameters"]["delta"] == loss.delta
    assert deployment["privacy_loss"]["number_of_privacy_units"] == facts.dataset.units
    assert deployment["basic"]["publication_date"] == "2026-11-23"


def test_without_a_measurement_utility_is_left_out(
    facts: CertificateFacts, make_bundle: Callable[..., bytes], public_keys: str
) -> None:
    unmeasured = replace(facts, leakage=None, answers=ALL_ANSWERS)
    made = verify_bundle(make_bundle(unmeasured), public_keys).predicate["registry"]
    assert "utility" not in made["record"]["deployment"]["implementation"]
    assert made["tier"] == 3
