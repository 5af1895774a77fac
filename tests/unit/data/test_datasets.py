from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.exc import IntegrityError as DatabaseRefusal
from tests.databases import allow, refuse

from llmos.config import load
from llmos.data.canaries import CanaryBook, make_canaries
from llmos.data.datasets import DatasetCard, Datasets
from llmos.data.records import Record, RecordFormat
from llmos.data.terms import DatasetTerms
from llmos.errors import (
    DataError,
    DatasetExists,
    IntegrityError,
    InvalidPrivacyParameter,
    MalformedRecord,
    PermissionDenied,
    TamperedObject,
    UnknownDataset,
)
from llmos.kernel import kernel as kernels
from llmos.kernel import schema
from llmos.kernel.identity import Principal, Role
from llmos.kernel.kernel import Kernel
from llmos.kernel.policy import Action
from llmos.kernel.pools import Part
from llmos.privacy import Classification, PrivacyLoss, PrivacyUnit

MARKER = "zanzibarite"  # a word that stands nowhere but in the records
TERMS = DatasetTerms(
    name="ward-7",
    classification=Classification.SENSITIVE,
    purposes=("training", "coding"),
    total=PrivacyLoss(8.0, 1e-6, PrivacyUnit("patient_id")),
    holdout_fraction=0.5,
)
RECORDS = [
    Record(f"p{number // 2}", f"note {number}", f"{MARKER} {number}") for number in range(200)
]
NO_CANARIES = CanaryBook(bytes(32), ())


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    opened = kernels.create(load(home=tmp_path / "home"))
    yield opened
    opened.store.close()


@pytest.fixture
def datasets(kernel: Kernel) -> Datasets:
    return Datasets(kernel.store, kernel.vault, kernel.monitor)


@pytest.fixture
def steward(kernel: Kernel) -> Principal:
    return add(kernel, "stella", Role.STEWARD)


def add(kernel: Kernel, name: str, role: Role) -> Principal:
    with kernel.monitor.act(kernel.principal(), Action.MANAGE_KEYS, kernel.home) as conn:
        return kernel.identity.add_principal(conn, name, frozenset({role}))


@dataclass(frozen=True)
class Only:
    """A grant for the named objects."""

    object_ids: frozenset[str]

    def permits(self, object_id: str) -> bool:
        return object_id in self.object_ids


def everything(card: DatasetCard) -> Only:
    return Only(frozenset({card.object_id, card.holdout_object_id, card.canary_object_id}))


def import_pairs(
    datasets: Datasets,
    who: Principal,
    *,
    terms: DatasetTerms = TERMS,
    book: CanaryBook = NO_CANARIES,
) -> DatasetCard:
    return datasets.import_records(
        who, terms, iter(RECORDS), format=RecordFormat.PROMPT_COMPLETION, book=book
    )


def traces(kernel: Kernel) -> dict[str, int]:
    """Count what an import could have left behind."""
    with kernel.store.read() as conn, kernel.vault._store.read() as keys_conn:
        counts = {
            table.name: conn.execute(select(func.count()).select_from(table)).scalar_one()
            for table in (schema.datasets, schema.budget_pools)
        }
        counts["object_keys"] = keys_conn.execute(
            select(func.count()).select_from(schema.object_keys)
        ).scalar_one()
    counts["files"] = sum(path.is_file() for path in kernel.config.home.glob("objects/**/*"))
    return counts


NOTHING = {"datasets": 0, "budget_pools": 0, "object_keys": 0, "files": 0}


def test_what_was_imported_can_be_opened(
    kernel: Kernel, datasets: Datasets, steward: Principal
) -> None:
    book = make_canaries(40)
    card = import_pairs(datasets, steward, book=book)
    training = list(datasets.open_records(card, everything(card)))
    holdout = list(datasets.open_holdout(card, everything(card)))
    planted = [c.record(RecordFormat.PROMPT_COMPLETION) for c in book.canaries if c.planted]
    assert Counter(training + holdout) == Counter(RECORDS + planted)
    assert set(planted) <= set(training)
    assert not {record.unit for record in training} & {record.unit for record in holdout}
    assert datasets.open_canaries(card, everything(card)) == book
    assert (card.records, card.holdout_records) == (len(training), len(holdout))
    assert card.units == len({record.unit for record in training})
    assert card.holdout_units == len({record.unit for record in holdout})
    assert card.characters == sum(len(r.prompt) + len(r.completion) for r in training)


def test_the_card_is_kept_and_does_not_tell_the_coins(
    datasets: Datasets, steward: Principal
) -> None:
    card = import_pairs(datasets, steward, book=make_canaries(7))
    other = import_pairs(datasets, steward, terms=replace(TERMS, name="a-ward"))
    assert datasets.card("ward-7") == card
    assert datasets.cards() == (other, card)  # by name
    assert card.canaries == 7
    assert card.classification is Classification.SENSITIVE
    assert card.purposes == ("training", "coding")
    shown = card.to_dict()
    assert json.loads(json.dumps(shown)) == shown
    assert "planted" not in json.dumps(shown)
    assert card.resource.attributes == {
        "classification": "sensitive",
        "purposes": ("training", "coding"),
    }


def test_the_pool_is_bound_to_what_was_stored(
    kernel: Kernel, datasets: Datasets, steward: Principal
) -> None:
    card = import_pairs(datasets, steward)
    with kernel.store.read() as conn:
        pool = conn.execute(select(schema.budget_pools)).mappings().one()
    assert pool["dataset"] == card.name
    assert pool["fingerprint"] == card.fingerprint
    assert pool["unit_column"] == "patient_id"
    assert float.fromhex(pool["epsilon"]) == 8.0
    assert float.fromhex(pool["delta"]) == 1e-6


def test_the_log_holds_hashes_and_counts_and_no_content(
    kernel: Kernel, datasets: Datasets, steward: Principal
) -> None:
    book = make_canaries(5)
    card = import_pairs(datasets, steward, book=book)
    entry = newest_entry(kernel)
    assert (entry["actor"], entry["action"]) == ("stella", "import-data")
    details = entry["details"]
    assert details["fingerprint"] == card.fingerprint
    assert details["canary_commitment"] == card.canary_commitment
    assert details["records"] == card.records
    assert (details["unit"], details["classification"]) == (card.unit_column, card.classification)
    assert details["purposes"] == list(card.purposes)
    written = json.dumps(entry)
    assert MARKER not in written
    assert not any(canary.secret in written or canary.unit in written for canary in book.canaries)
    kernel.auditlog.verify()


def newest_entry(kernel: Kernel) -> dict[str, Any]:
    with kernel.store.read() as conn:
        data = conn.execute(
            select(schema.log_entries.c.data).order_by(schema.log_entries.c.idx.desc()).limit(1)
        ).scalar_one()
    entry: dict[str, Any] = json.loads(data)
    return entry


def test_nothing_lies_in_the_home_in_the_clear(
    kernel: Kernel, datasets: Datasets, steward: Principal
) -> None:
    book = make_canaries(5)
    import_pairs(datasets, steward, book=book)
    files = [path for path in kernel.config.home.rglob("*") if path.is_file()]
    contents = b"".join(path.read_bytes() for path in files)
    assert len(files) > 5
    assert MARKER.encode() not in contents
    assert not any(canary.prefix.encode() in contents for canary in book.canaries)


def test_a_taken_name(kernel: Kernel, datasets: Datasets, steward: Principal) -> None:
    card = import_pairs(datasets, steward)
    before = traces(kernel)
    unread = iter(RECORDS)
    with pytest.raises(DatasetExists, match="ward-7"):
        datasets.import_records(
            steward, TERMS, unread, format=RecordFormat.PROMPT_COMPLETION, book=NO_CANARIES
        )
    assert next(unread) == RECORDS[0]  # refused before the first record was read
    assert traces(kernel) == before
    assert datasets.cards() == (card,)


def test_a_name_that_is_taken_while_the_file_is_read(
    kernel: Kernel, datasets: Datasets, steward: Principal
) -> None:
    def slowly() -> Iterator[Record]:
        yield from RECORDS
        import_pairs(datasets, steward)

    with pytest.raises(DatasetExists):
        datasets.import_records(
            steward, TERMS, slowly(), format=RecordFormat.PROMPT_COMPLETION, book=NO_CANARIES
        )
    assert traces(kernel) == {"datasets": 1, "budget_pools": 1, "object_keys": 3, "files": 3}
    kernel.auditlog.verify()


def test_a_bad_row_at_the_end_leaves_nothing(
    kernel: Kernel, datasets: Datasets, steward: Principal
) -> None:
    def broken() -> Iterator[Record]:
        yield from RECORDS
        raise MalformedRecord("x.csv", 201, "broken")

    with pytest.raises(MalformedRecord):
        datasets.import_records(
            steward, TERMS, broken(), format=RecordFormat.PROMPT_COMPLETION, book=NO_CANARIES
        )
    assert traces(kernel) == NOTHING


def test_who_may_not_import_leaves_a_record_and_nothing_else(
    kernel: Kernel, datasets: Datasets
) -> None:
    with pytest.raises(PermissionDenied):
        import_pairs(datasets, add(kernel, "erik", Role.ENGINEER))
    assert traces(kernel) == NOTHING
    assert (newest_entry(kernel)["actor"], newest_entry(kernel)["outcome"]) == ("erik", "denied")
    kernel.auditlog.verify()


@pytest.mark.parametrize("table", ["datasets", "budget_pools", "log_entries"])
def test_when_the_catalogue_cannot_be_written_the_objects_go_too(
    table: str, kernel: Kernel, datasets: Datasets, steward: Principal
) -> None:
    with kernel.store.transaction() as conn:
        refuse(conn, "INSERT", table)
    with pytest.raises(DatabaseRefusal, match="no more"):
        import_pairs(datasets, steward, book=make_canaries(3))
    assert traces(kernel) == NOTHING
    if table == "log_entries":  # the failure could not be recorded, so the log knows no trigger
        with kernel.store.transaction() as conn:
            allow(conn, table)
    kernel.auditlog.verify()


def test_when_the_last_object_cannot_be_written_the_first_go_too(
    kernel: Kernel, datasets: Datasets, steward: Principal
) -> None:
    with kernel.vault._store.transaction() as conn:
        refuse(conn, "INSERT", "object_keys", when="NEW.kind = 'canaries'")
    with pytest.raises(DatabaseRefusal, match="no more"):
        import_pairs(datasets, steward)
    assert traces(kernel) == NOTHING
    kernel.auditlog.verify()


def test_an_unknown_dataset(datasets: Datasets) -> None:
    with pytest.raises(UnknownDataset, match="nowhere"):
        datasets.card("nowhere")
    assert datasets.cards() == ()


def test_without_a_grant_nothing_opens(datasets: Datasets, steward: Principal) -> None:
    card = import_pairs(datasets, steward)
    none = Only(frozenset())
    with pytest.raises(PermissionDenied):
        next(datasets.open_records(card, none))
    with pytest.raises(PermissionDenied):
        next(datasets.open_holdout(card, none))
    with pytest.raises(PermissionDenied):
        datasets.open_canaries(card, none)
    with pytest.raises(PermissionDenied):  # a grant for one object is none for another
        next(datasets.open_holdout(card, Only(frozenset({card.object_id}))))


def test_a_grant_of_the_monitor_opens_until_its_end(
    kernel: Kernel, datasets: Datasets, steward: Principal
) -> None:
    card = import_pairs(datasets, steward)
    with kernel.monitor.admit(
        steward,
        Action.READ_DATA,
        card.resource,
        key="read-1",
        objects=frozenset({card.object_id}),
        charge=None,
        context={},
        details={},
    ) as grant:
        assert len(list(datasets.open_records(card, grant))) == card.records
        with pytest.raises(PermissionDenied):
            next(datasets.open_holdout(card, grant))
    with pytest.raises(PermissionDenied):
        next(datasets.open_records(card, grant))


def test_swapped_objects_are_noticed(datasets: Datasets, steward: Principal) -> None:
    card = import_pairs(datasets, steward)
    swapped = replace(card, object_id=card.holdout_object_id)
    with pytest.raises(TamperedObject):
        next(datasets.open_records(swapped, everything(card)))


def test_another_datasets_records_and_book_are_noticed(
    kernel: Kernel, datasets: Datasets, steward: Principal
) -> None:
    """Whoever can write kernel.db points the row of one dataset to the objects of another."""
    card = import_pairs(datasets, steward, book=make_canaries(2))
    other = import_pairs(datasets, steward, terms=replace(TERMS, name="b"), book=make_canaries(2))
    with kernel.store.transaction() as conn:
        conn.execute(
            update(schema.datasets)
            .where(schema.datasets.c.name == "ward-7")
            .values(object_id=other.object_id)
        )
    grant = Only(everything(card).object_ids | everything(other).object_ids)
    with pytest.raises(TamperedObject, match="does not belong to its unit and its place"):
        list(datasets.open_records(datasets.card("ward-7"), grant))
    with pytest.raises(IntegrityError, match="commitment"):
        datasets.open_canaries(replace(card, canary_object_id=other.canary_object_id), grant)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"name": "Ward"},
        {"name": "-ward"},
        {"name": "ward 7"},
        {"name": "../ward"},
        {"name": "w" * 64},
        {"name": "ward\n"},
        {"purposes": ()},
        {"purposes": ("training", "Marketing!")},
        {"holdout_fraction": 1.0},
    ],
)
def test_terms_that_cannot_be_kept(changes: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        replace(TERMS, **changes)
    assert caught.value.hint


def test_a_purpose_may_have_a_part_of_the_budget(
    kernel: Kernel, datasets: Datasets, steward: Principal
) -> None:
    terms = replace(TERMS, part_epsilons={Part("coding"): 2.0})
    import_pairs(datasets, steward, terms=terms)
    pools = [(p.id, p.purpose, p.epsilon, p.delta) for p in kernel.budget.pools()]
    assert pools == [("ward-7", None, 8.0, 1e-6), ("ward-7/coding", "coding", 2.0, 1e-6)]


def test_a_part_is_of_a_known_purpose_and_no_more_than_the_whole() -> None:
    with pytest.raises(DataError, match="no purpose"):
        replace(TERMS, part_epsilons={Part("research"): 2.0})
    for epsilon in (8.1, float("nan")):
        with pytest.raises(InvalidPrivacyParameter, match="epsilon of ward-7/coding"):
            replace(TERMS, part_epsilons={Part("coding"): epsilon})


def test_derived_data_know_their_parents(
    kernel: Kernel, datasets: Datasets, steward: Principal
) -> None:
    import_pairs(datasets, steward)
    heir = replace(TERMS, name="heir", purposes=("coding",), parents=("ward-7",))
    card = import_pairs(datasets, steward, terms=heir)
    assert card == datasets.card("heir")
    assert card.parents == ("ward-7",)
    assert [pool.id for pool in kernel.budget.charged("heir", Part("coding"))] == ["heir", "ward-7"]


@pytest.mark.parametrize(
    ("changes", "error", "why"),
    [
        ({"parents": ("nobody",)}, UnknownDataset, "nobody"),
        ({"purposes": ("training", "marketing")}, DataError, "marketing"),
        ({"classification": Classification.SYNTHETIC}, DataError, "sensitive as well"),
        ({"total": PrivacyLoss(8.0, 1e-6, PrivacyUnit("visit_id"))}, DataError, "visit_id"),
    ],
)
def test_derived_data_are_no_less_protected(
    kernel: Kernel,
    datasets: Datasets,
    steward: Principal,
    changes: dict[str, Any],
    error: type[Exception],
    why: str,
) -> None:
    import_pairs(datasets, steward)
    before = traces(kernel)
    heir = replace(TERMS, **({"name": "heir", "parents": ("ward-7",)} | changes))
    with pytest.raises(error, match=why):
        import_pairs(datasets, steward, terms=heir)
    assert traces(kernel) == before
