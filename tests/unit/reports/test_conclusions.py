"""Nothing in a certificate can be said that its records do not say, by anyone, with any key."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.reports.conftest import ALL_ANSWERS
from tests.unit.reports.test_evidence import Change, changed, set_at

from llmos.crypto.notes import NoteKey
from llmos.errors import VerificationFailed
from llmos.reports import evidence
from llmos.reports.facts import CertificateFacts
from llmos.reports.sentences import value_at
from llmos.reports.verification import verify_bundle

Document = dict[str, Any]
VECTORS = Path(__file__).parents[2] / "vectors" / "certificates"


def leaves(value: Any, pointer: str = "") -> Iterator[str]:
    """Yield the pointers to all values that hold no others."""
    match value:
        case dict() if value:
            pairs = [(str(name), part) for name, part in value.items()]
        case list() if value:
            pairs = [(str(place), part) for place, part in enumerate(value)]
        case _:
            yield pointer
            return
    for name, part in pairs:
        yield from leaves(part, f"{pointer}/{name.replace('~', '~0').replace('/', '~1')}")


def change_at(pointer: str) -> Change:
    """Return a change of one leaf of the predicate."""
    return lambda made: set_at(
        made["predicate"], pointer, changed(value_at(made["predicate"], pointer))
    )


def test_no_leaf_can_be_changed_by_the_home_itself(
    made: Document, make_changed: Callable[[Change], bytes], public_keys: str
) -> None:
    """The home signs and logs the false statement properly; what it says still does not follow."""
    pointers = list(leaves(made["predicate"]))
    assert len(pointers) > 300
    accepted = []
    for pointer in pointers:
        try:
            verify_bundle(make_changed(change_at(pointer)), public_keys)
        except VerificationFailed:
            continue
        accepted.append(pointer)
    assert accepted == []


def test_a_home_that_forges_records_and_conclusions_alike_can_change_only_what_is_listed(
    made: Document, make_forged: Callable[[Change], bytes], public_keys: str
) -> None:
    records = ("assessment", "hazards", "questions", "registry")
    pointers = [p for p in leaves(made["predicate"]) if p.split("/")[1] not in records]
    accepted = set()
    for pointer in pointers:
        try:
            verify_bundle(make_forged(change_at(pointer)), public_keys)
        except VerificationFailed:
            continue
        accepted.add(pointer)
    assert [p for p in sorted(accepted) if not p.startswith(evidence.HOME_ALONE)] == []
    for listed in evidence.HOME_ALONE:
        assert any(pointer.startswith(listed) for pointer in accepted)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_another_key_cannot_sign_any_change(
    data: st.DataObject, made: Document, make_signed: Callable[..., bytes], public_keys: str
) -> None:
    stranger = NoteKey("llmos.local/1/certificates", os.urandom(32))
    other = copy.deepcopy(made)
    pointer = data.draw(st.sampled_from(list(leaves(made["predicate"]))))
    change_at(pointer)(other)
    with pytest.raises(VerificationFailed, match="not signed by"):
        verify_bundle(make_signed(other, key=stranger), public_keys)


@pytest.mark.parametrize(
    ("section", "place"),
    [
        ("assessment", "/assessment/0/sentences/0/text"),
        ("hazards", "/hazards/0/state"),
        ("questions", "/questions/0/answer"),
        ("registry", "/registry/tier"),
    ],
)
def test_a_false_sentence_is_named(
    section: str, place: str, make_changed: Callable[[Change], bytes], public_keys: str
) -> None:
    with pytest.raises(VerificationFailed, match=f"says in {place} what its records do not"):
        verify_bundle(make_changed(change_at(place)), public_keys)


def test_true_is_not_one(make_changed: Callable[[Change], bytes], public_keys: str) -> None:
    def lie(made: Document) -> None:
        assert made["predicate"]["registry"]["fields"][0]["tier"] == 1
        made["predicate"]["registry"]["fields"][0]["tier"] = True

    with pytest.raises(VerificationFailed, match="what its records do not"):
        verify_bundle(make_changed(lie), public_keys)


def test_a_section_of_another_length_is_named_as_a_whole(
    make_changed: Callable[[Change], bytes], public_keys: str
) -> None:
    with pytest.raises(VerificationFailed, match="says in /hazards what its records do not"):
        verify_bundle(make_changed(lambda made: made["predicate"]["hazards"].pop()), public_keys)


def test_every_basis_stands_in_the_predicate(made: Document) -> None:
    predicate = made["predicate"]
    said = [s for layer in predicate["assessment"] for s in layer["sentences"]]
    for sentence in (*said, *predicate["hazards"], *predicate["registry"]["fields"]):
        assert sentence["basis"]
        for pointer in sentence["basis"]:
            value_at(predicate, pointer)


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("production", [False, True])
def test_every_kind_of_certificate_verifies(
    answered: bool,
    measured: bool,
    production: bool,
    facts: CertificateFacts,
    make_bundle: Callable[..., bytes],
    public_keys: str,
) -> None:
    other = replace(
        facts,
        answers=ALL_ANSWERS if answered else {},
        leakage=facts.leakage if measured else None,
        training=replace(facts.training, production=production),
    )
    verified = verify_bundle(make_bundle(other), public_keys)
    text = json.dumps(verified.statement)
    assert ("NOT FOR PRODUCTION" in text) is not production
    assert ("nobody was asked yet" in text) is not answered
    assert ("Utility was not measured" in text) is not measured
    assert str(verified.summary()["records"]).startswith("5 log" if measured else "4 log")


def test_a_large_epsilon_and_a_large_delta_are_called_so(
    facts: CertificateFacts, make_bundle: Callable[..., bytes], public_keys: str
) -> None:
    people = replace(facts, dataset=replace(facts.dataset, units=200_000, records=200_000))
    hazards = verify_bundle(make_bundle(people), public_keys).predicate["hazards"]
    assert {h["id"]: h["state"] for h in hazards}["delta"] == "residual"


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_certificate_that_was_issued_once_still_verifies(version: str) -> None:
    """If this fails after a change of words: make a new version and keep the old one."""
    folder = VECTORS / version
    verified = verify_bundle(
        (folder / "private.certificate.json").read_bytes(), (folder / "home.pub").read_text()
    )
    assert verified.model == "private"
    assert verified.records_checked == (None if version == "v1" else 5)
    assert str(verified.summary()["records"]).startswith(
        "not checked" if version == "v1" else "5 log"
    )
