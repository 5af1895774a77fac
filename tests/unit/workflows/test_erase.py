"""Proposals to erase: who may, whom they find, and that nothing names the person."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import rfc8785
from sqlalchemy import delete, event, select, update
from tests.clinics import PERSON, erased, propose, read, units, write_clinic
from tests.databases import copy_home
from tests.homes import Person, hire, last_records, log_size, opened

import llmos
from llmos.data.canaries import CanaryBook
from llmos.data.lineage import block_number
from llmos.data.records import Record, encode_record, fingerprint
from llmos.data.terms import Block
from llmos.errors import ApprovalConflict, DataError, PermissionDenied, UnknownDataset
from llmos.kernel import schema
from llmos.system import System
from llmos.workflows import split_data


@pytest.fixture
def home(clinic_home: Path, tmp_path: Path) -> Path:
    copy_home(clinic_home, tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def bob(home: Path, tmp_path: Path) -> Person:
    return hire(home, "bob", "steward", tmp_path)


def test_a_proposal_lists_every_dataset_of_the_person_and_not_the_name(system: System) -> None:
    asked = system.data.erase(f"  {PERSON}\n", reason="request 17")
    assert asked["subject"] == "one person from clinic, study"
    card = system.datasets.card("clinic")
    keyed = system.kernel.vault.keyring.unit_name("clinic", PERSON)
    assert asked["request"]["units"][0] == {
        "dataset": "clinic", "object_id": card.object_id, "name": keyed
    }  # fmt: skip
    (record,) = last_records(system, 1)
    assert (record["action"], record["outcome"]) == ("erase-data", "done")
    assert record["details"]["approval"] == asked["id"]
    assert PERSON not in json.dumps([asked, record], ensure_ascii=False)


@pytest.mark.parametrize(
    ("unit", "reason", "said"),
    [
        ("nobody-0815", "request 17", "no dataset holds this person"),
        ("  ", "request 17", "nobody is named"),
        (PERSON, f"{PERSON.upper()} asked for it", "the reason names the person"),
    ],
)
def test_what_cannot_be_proposed_leaves_nothing(
    system: System, unit: str, reason: str, said: str
) -> None:
    with pytest.raises(DataError, match=said) as caught:
        system.data.erase(unit, reason=reason)
    assert PERSON not in str(caught.value)
    assert system.approvals.overview() == []


def test_a_reason_is_needed_and_datasets_must_be_there(system: System) -> None:
    with pytest.raises(ApprovalConflict, match="reason"):
        system.data.erase(PERSON, reason=" ")
    with pytest.raises(UnknownDataset):
        system.data.erase(PERSON, reason="request 17", datasets=["nothing"])
    with pytest.raises(DataError, match="no dataset holds"):
        system.data.erase(PERSON, reason="request 17", datasets=["notes"])
    with pytest.raises(DataError, match="no dataset holds"):
        system.data.erase(PERSON, reason="request 17", column="doctor_id")
    assert system.approvals.overview() == []


def test_a_word_within_a_word_of_the_reason_is_not_the_person(system: System) -> None:
    asked = system.data.erase("p7", reason="see p70 of the file")
    assert asked["subject"] == "one person from notes, ward"


def test_one_value_in_two_columns_may_be_two_people(home: Path, tmp_path: Path) -> None:
    doctors = tmp_path / "doctors.jsonl"
    doctors.write_text(json.dumps({"doctor_id": PERSON, "text": "on call"}) + "\n")
    with opened(home) as system:
        system.import_data(
            doctors, name="doctors", unit="doctor_id", text="text", epsilon=8, delta=1e-5, holdout=0
        )
        with pytest.raises(DataError, match="doctor_id, patient_id") as caught:
            system.data.erase(PERSON, reason="request 17")
        assert "--column" in caught.value.hint
        by_column = system.data.erase(PERSON, reason="request 17", column="doctor_id")
        assert by_column["subject"] == "one person from doctors"
        named = system.data.erase(PERSON, reason="request 17", datasets=["study"])
        assert named["subject"] == "one person from study"


def test_policy_says_who_may_propose_and_tells_others_nothing(home: Path, tmp_path: Path) -> None:
    engineer = hire(home, "eve", "engineer", tmp_path)
    with engineer.at_work() as system:
        for unit in (PERSON, "nobody-0815"):
            with pytest.raises(PermissionDenied):
                system.data.erase(unit, reason="request 17")
        assert system.approvals.overview() == []
        (record,) = last_records(system, 1)
        assert (record["action"], record["outcome"]) == ("erase-data", "denied")


def test_one_person_cannot_erase_alone_and_a_refusal_changes_nothing(
    home: Path, bob: Person
) -> None:
    approval = propose(home)
    with opened(home) as system, pytest.raises(ApprovalConflict):
        system.approvals.decide(approval, approve=True)
    with bob.at_work() as system:
        assert "receipt" not in system.approvals.decide(approval, approve=False)
        assert PERSON in units(read(system, "clinic"))
        assert system.datasets.card("clinic").erased_units == 0


def test_whoever_was_erased_is_not_erased_again_but_from_what_is_left(
    home: Path, bob: Person, tmp_path: Path
) -> None:
    first = erased(home, bob, "clinic")
    with opened(home) as system:
        with pytest.raises(ApprovalConflict, match=first["id"]):
            system.data.erase(PERSON, reason="request 18", datasets=["clinic"])
        rest = system.data.erase(PERSON, reason="request 18")
        assert rest["subject"] == "one person from study"


def test_a_held_out_person_is_erased_too(home: Path, bob: Person, tmp_path: Path) -> None:
    """A fair coin decides whether the person is held out; 60 imports miss it with 2^-60."""
    notes = write_clinic(tmp_path / "split.jsonl", people=40)
    with opened(home) as system:
        for attempt in range(60):
            name = f"split-{attempt}"
            system.import_data(
                notes, name=name, unit="patient_id", text="text", epsilon=8, delta=1e-5, holdout=0.5
            )
            if PERSON not in units(read(system, name)):
                break
    decided = erased(home, bob, name)
    with opened(home) as system:
        card = system.datasets.card(name)
        assert (card.erased_units, card.erased_holdout_units) == (0, 1)
    receipt = llmos.verify(decided["receipt"])
    assert (receipt["erased_from"], receipt["models"]) == ([f"{name}, held out"], [])


def make_old(system: System, dataset: str) -> list[Record]:
    """Turn a dataset into one of the first release: one clear line a record in its object."""
    records = read(system, dataset)
    card = system.datasets.card(dataset)
    stored = b"".join(encode_record(record) + b"\n" for record in records)
    object_id = system.kernel.vault.put("records", io.BytesIO(stored))
    table = schema.datasets
    with system.kernel.store.transaction() as conn:
        fields = json.loads(
            conn.execute(select(table.c.card).where(table.c.name == dataset)).scalar_one()
        )
        del fields["sealed_units"]
        new = {
            "card": rfc8785.dumps(fields).decode(),
            "object_id": object_id,
            "fingerprint": fingerprint(stored),
        }
        conn.execute(update(table).where(table.c.name == dataset).values(new))
    with system.kernel.vault.keyring.store.transaction() as conn:
        this = schema.unit_keys.c.object_id == card.object_id
        conn.execute(delete(schema.unit_keys).where(this))
    return records


def test_datasets_of_the_first_release_are_read_and_refuse_to_erase(
    home: Path, bob: Person
) -> None:
    with opened(home) as system:
        records = make_old(system, "clinic")
        assert read(system, "clinic") == records
        assert not system.datasets.card("clinic").sealed_units
        for datasets in ([], ["clinic"], ["clinic", "study"]):
            with pytest.raises(DataError, match="clinic was imported before") as caught:
                system.data.erase(PERSON, reason="request 17", datasets=datasets)
            assert "anew" in caught.value.hint
        assert system.approvals.overview() == []
        size = log_size(system)
    erased(home, bob, "study")
    with opened(home) as system:
        assert read(system, "clinic") == records
        assert PERSON not in units(read(system, "study"))
        assert log_size(system) > size


def test_a_block_brings_nobody_back(home: Path, bob: Person) -> None:
    """An erasure lists the datasets when it is proposed; a split makes new ones."""
    asked = propose(home)
    with opened(home) as system:
        names = [card.name for card in system.datasets.cards()]
        with pytest.raises(ApprovalConflict, match=asked):
            system.data.split("clinic", blocks=2)
        assert [card.name for card in system.datasets.cards()] == names
    with bob.at_work() as system:
        system.approvals.decide(asked, approve=True)
        everybody = [record for record in read(system, "study") if record.unit != PERSON]
        blocks = system.data.split("clinic", blocks=2)
        found = [record for block in blocks for record in read(system, block.name)]
        assert sorted(map(encode_record, found)) == sorted(map(encode_record, everybody))


def test_who_was_erased_while_the_data_were_split_is_in_no_block(home: Path, bob: Person) -> None:
    with opened(home) as system:
        before = read(system, "clinic")  # as a split that began before
        card = system.datasets.card("clinic")
    erased(home, bob)
    with opened(home) as system:
        unit_name = system.kernel.vault.keyring.unit_name("clinic", PERSON)
        block = Block("clinic", block_number(unit_name, 2), 2)
        members = [
            record
            for record in before
            if block_number(system.kernel.vault.keyring.unit_name("clinic", record.unit), 2)
            == block.number
        ]
        assert PERSON in units(members)
        with pytest.raises(DataError, match="was erased from clinic meanwhile"):
            system.datasets.register(
                system.who,
                split_data._terms(card, block, system.parts),
                members,
                [],
                format=card.format,
                book=CanaryBook(bytes(32), ()),
            )
        assert not any(c.name.startswith("clinic-") for c in system.datasets.cards())


def test_to_erase_from_the_whole_is_to_erase_from_its_blocks(home: Path, bob: Person) -> None:
    with opened(home) as system:
        system.data.split("clinic", blocks=2)
        blocks = [c.name for c in system.datasets.cards() if c.name.startswith("clinic-")]
        (of_person,) = [name for name in blocks if PERSON in _held(system, name)]
    asked = erased(home, bob, "clinic")
    assert {unit["dataset"] for unit in asked["request"]["units"]} == {"clinic", of_person}
    with opened(home) as system:
        assert not any(PERSON in _held(system, name) for name in ("clinic", *blocks))
        assert PERSON in _held(system, "study")  # which was not named


def _held(system: System, dataset: str) -> set[str]:
    return units(read(system, dataset))


def test_a_dataset_that_is_made_while_the_person_is_looked_for(
    home: Path, system: System, tmp_path: Path
) -> None:
    """The proposal would not list it; it is refused, and nothing of it is left."""
    engine = system.kernel.vault.keyring.store._engine

    def imports(*_: object) -> None:
        with opened(home) as other:
            other.import_data(
                write_clinic(tmp_path / "late.jsonl"), unit="patient_id", text="text",
                epsilon=8, delta=1e-5, holdout=0,
            )  # fmt: skip

    before = system.approvals.overview()
    event.listen(engine, "before_cursor_execute", imports, once=True)
    with pytest.raises(ApprovalConflict, match="made just now"):
        system.data.erase(PERSON, reason="request 17")
    assert system.approvals.overview() == before
    assert system.data.erase(PERSON, reason="request 17")["subject"].endswith("clinic, late, study")
