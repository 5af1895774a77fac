"""A certificate rests on log entries: each pair of a record and what it says is broken once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import rfc8785
from tests.unit.reports.conftest import prove_all, records_for

from llmos.crypto.notes import NoteKey
from llmos.errors import VerificationFailed
from llmos.reports import certificate, evidence
from llmos.reports.facts import CertificateFacts
from llmos.reports.sentences import value_at
from llmos.reports.verification import verify_bundle
from llmos.transparency.proofs import LogProof

Document = dict[str, Any]
Change = Callable[[Document], object]
FIELDS = [
    (name, pointer, place)
    for name, (_, said) in evidence._ENTRIES.items()
    for pointer, place in (said | (evidence._LATER if name == "import" else {})).items()
]


def changed(value: object) -> Any:
    """Return another value of the same kind."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return f"{value[:-1]}{'1' if value[-1:] == '0' else '0'}"
        case dict():
            name = sorted(value)[-1]
            return {**value, name: changed(value[name])}
        case list():
            return [*value, "more"]
        case _:
            return "something"


def set_at(document: Any, pointer: str, value: object) -> None:
    """Put a value where a pointer leads."""
    *parents, last = pointer.split("/")[1:]
    for name in parents:
        document = document[int(name)] if isinstance(document, list) else document[name]
    document[int(last) if isinstance(document, list) else last] = value


def resealed(
    records: Mapping[str, Document], made: Document, keys: tuple[NoteKey, NoteKey]
) -> tuple[Document, dict[str, LogProof]]:
    """Put other records into the log and let the statement point to them."""
    proofs = dict(zip(records, prove_all(list(records.values()), keys[1]), strict=True))
    statement = json.loads(json.dumps(made))
    statement["predicate"]["records"] = evidence.pointers(proofs)
    return statement, proofs


@pytest.mark.parametrize(("name", "pointer", "place"), FIELDS)
def test_what_the_log_recorded_otherwise_is_refused(
    name: str,
    pointer: str,
    place: str,
    facts: CertificateFacts,
    made: Document,
    keys: tuple[NoteKey, NoteKey],
    make_signed: Callable[..., bytes],
    public_keys: str,
) -> None:
    records = records_for(facts)
    set_at(records[name], pointer, changed(value_at(records[name], pointer)))
    statement, proofs = resealed(records, made, keys)
    with pytest.raises(VerificationFailed, match=f"{place} is not what the log recorded"):
        verify_bundle(make_signed(statement, records=proofs), public_keys)


@pytest.mark.parametrize("name", list(evidence._ENTRIES))
@pytest.mark.parametrize("pointer", ["/action", "/outcome", "/resource"])
def test_an_entry_of_another_act_is_refused(
    name: str,
    pointer: str,
    facts: CertificateFacts,
    made: Document,
    keys: tuple[NoteKey, NoteKey],
    make_signed: Callable[..., bytes],
    public_keys: str,
) -> None:
    records = records_for(facts)
    set_at(records[name], pointer, "other")
    statement, proofs = resealed(records, made, keys)
    with pytest.raises(VerificationFailed, match="is of something else"):
        verify_bundle(make_signed(statement, records=proofs), public_keys)


@pytest.mark.parametrize("name", list(evidence._ENTRIES))
def test_a_record_that_is_missing_is_refused(
    name: str,
    facts: CertificateFacts,
    made: Document,
    make_signed: Callable[..., bytes],
    public_keys: str,
) -> None:
    left = {other: proof for other, proof in facts.evidence.items() if other != name}
    with pytest.raises(VerificationFailed, match="has the records"):
        verify_bundle(make_signed(made, records=left), public_keys)


def test_records_of_another_log_or_another_place_are_refused(
    facts: CertificateFacts,
    made: Document,
    keys: tuple[NoteKey, NoteKey],
    make_signed: Callable[..., bytes],
    public_keys: str,
) -> None:
    stranger = (keys[0], NoteKey(keys[1].name, os.urandom(32)))
    statement, proofs = resealed(records_for(facts), made, stranger)
    with pytest.raises(VerificationFailed, match="not signed by"):
        verify_bundle(make_signed(statement, records=proofs), public_keys)
    moved = replace(facts.evidence["fit"], index=facts.evidence["fit"].index + 1)
    statement["predicate"]["records"] = evidence.pointers({**facts.evidence, "fit": moved})
    with pytest.raises(VerificationFailed, match="does not contain this entry"):
        verify_bundle(make_signed(statement, records={**facts.evidence, "fit": moved}), public_keys)
    with pytest.raises(VerificationFailed, match="other log entries than it carries"):
        verify_bundle(make_signed(made, records={**facts.evidence, "fit": moved}), public_keys)


@pytest.mark.parametrize(
    ("place", "value", "fault"),
    [
        ("/cap", 1, "its cap does not follow"),
        ("/epsilon", 7.5, "its cap does not follow"),
        ("/renyi_order", 4, "its cap does not follow"),
        ("/spent", 5, "less is spent than was charged"),
        ("/held", 10**13, "more is spent and held than there is"),
    ],
)
def test_a_budget_that_is_no_ledgers_is_refused(
    place: str,
    value: float,
    fault: str,
    make_forged: Callable[[Change], bytes],
    public_keys: str,
) -> None:
    forged = make_forged(lambda made: set_at(made, f"/predicate/budget{place}", value))
    with pytest.raises(VerificationFailed, match=fault):
        verify_bundle(forged, public_keys)


def test_a_charge_that_does_not_follow_from_the_mechanism_is_refused_though_it_is_logged(
    facts: CertificateFacts, make_bundle: Callable[..., bytes], public_keys: str
) -> None:
    cheaper = {"notes": facts.budget.charged["notes"] // 2}
    false = replace(facts, budget=replace(facts.budget, charged=cheaper))
    with pytest.raises(VerificationFailed, match="does not follow from the mechanism"):
        verify_bundle(make_bundle(false), public_keys)


def test_an_import_of_before_says_less_and_what_it_says_is_compared(
    facts: CertificateFacts,
    made: Document,
    keys: tuple[NoteKey, NoteKey],
    make_signed: Callable[..., bytes],
    public_keys: str,
) -> None:
    records = records_for(facts)
    for pointer in evidence._LATER:
        del records["import"]["details"][pointer.rpartition("/")[2]]
    statement, proofs = resealed(records, made, keys)
    assert verify_bundle(make_signed(statement, records=proofs), public_keys).model == "ward"


BLOCK = {"of": "clinic", "number": 2, "blocks": 3}


def test_a_block_says_what_it_is_and_rests_on_its_import(
    facts: CertificateFacts, make_bundle: Callable[..., bytes], public_keys: str
) -> None:
    of_block = replace(facts, dataset=replace(facts.dataset, block=BLOCK))
    predicate = verify_bundle(make_bundle(of_block), public_keys).predicate
    (said,) = (
        sentence
        for section in predicate["assessment"]
        for sentence in section["sentences"]
        if sentence["id"] == "block"
    )
    assert said["text"].startswith("notes is block 2 of 3 of clinic.")
    assert "/records/import" in said["basis"]
    assert {evidence.LOGGED[place.rpartition("/")[0]] for place in said["basis"][1:4]} == {"import"}


@pytest.mark.parametrize("recorded", [None, BLOCK | {"number": 1}])
def test_a_block_that_the_import_did_not_record_is_refused(
    recorded: Document | None,
    facts: CertificateFacts,
    keys: tuple[NoteKey, NoteKey],
    make_signed: Callable[..., bytes],
    public_keys: str,
) -> None:
    of_block = replace(facts, dataset=replace(facts.dataset, block=BLOCK))
    made = json.loads(rfc8785.dumps(certificate.statement(of_block, keys[0].name)))
    records = records_for(facts)
    if recorded is not None:
        records["import"]["details"]["block"] = recorded
    statement, proofs = resealed(records, made, keys)
    with pytest.raises(VerificationFailed, match="/data/block is not what the log recorded"):
        verify_bundle(make_signed(statement, records=proofs), public_keys)


def test_a_block_that_the_certificate_conceals_is_refused(
    facts: CertificateFacts,
    made: Document,
    keys: tuple[NoteKey, NoteKey],
    make_signed: Callable[..., bytes],
    public_keys: str,
) -> None:
    records = records_for(facts)
    records["import"]["details"]["block"] = BLOCK
    statement, proofs = resealed(records, made, keys)
    with pytest.raises(VerificationFailed, match="/data/block is not what the log recorded"):
        verify_bundle(make_signed(statement, records=proofs), public_keys)


def test_what_only_the_home_says_is_listed(made: Document) -> None:
    for pointer in evidence.HOME_ALONE:
        value_at(made["predicate"], pointer)
    assert rfc8785.dumps(made)
