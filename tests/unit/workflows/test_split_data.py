"""Blocks share no person, have the whole's budgets, and are made once, all or the missing ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sqlalchemy.exc import IntegrityError as DatabaseRefusal
from tests.databases import allow, refuse
from tests.homes import TRAINING, checked_books, close, hire, log_size, write_notes
from tests.homes import opened as open_home

from llmos.data.canaries import DEFAULT_TEMPLATE, CanaryBook
from llmos.data.datasets import DatasetCard
from llmos.data.records import Record
from llmos.data.terms import Block
from llmos.errors import (
    BudgetExceeded,
    DataError,
    DatasetExists,
    LedgerConflict,
    PermissionDenied,
    UnknownDataset,
)
from llmos.kernel.policy import Action
from llmos.system import System
from llmos.workflows.split_data import _terms

COUNT = 3


@pytest.fixture
def whole(system: System, tmp_path: Path) -> DatasetCard:
    return system.import_data(
        write_notes(tmp_path / "clinic.jsonl", 60),
        unit="patient_id",
        text="text",
        purposes=("training", "care"),
        epsilon=4,
        delta=1e-5,
        holdout=0.3,
        canaries=40,
        purpose_epsilons={"care": 2},
        tenant_epsilons={"ward": 3, "ward/care": 1},
    )


class Content(NamedTuple):
    training: list[Record]
    holdout: list[Record]
    book: CanaryBook

    @property
    def people(self) -> set[str]:
        return {record.unit for record in (*self.training, *self.holdout)}


def names(system: System) -> list[str]:
    """Return the datasets that a test has made."""
    return [c.name for c in system.datasets.cards() if c.name not in {"notes", "ward"}]


def content(system: System, card: DatasetCard) -> Content:
    """Open everything of a dataset, under a grant."""
    objects = {card.object_id, card.holdout_object_id, card.canary_object_id}
    datasets, monitor, who = system.datasets, system.kernel.monitor, system.who
    with monitor.admit(
        who, Action.IMPORT_DATA, card.resource, key="look", objects=objects, charge=None
    ) as grant:
        return Content(
            list(datasets.open_records(card, grant)),
            list(datasets.open_holdout(card, grant)),
            datasets.open_canaries(card, grant),
        )


def test_everybody_is_in_one_block_with_all_their_records(
    system: System, whole: DatasetCard
) -> None:
    cards = system.data.split("clinic", blocks=COUNT)
    assert [card.name for card in cards] == ["clinic-1", "clinic-2", "clinic-3"]
    assert [card.block for card in cards] == [Block("clinic", n, COUNT) for n in (1, 2, 3)]
    assert system.datasets.card("clinic-2") == cards[1]
    before = content(system, whole)
    parts = [content(system, card) for card in cards]
    for found, expected in (
        ([r for part in parts for r in part.training], before.training),
        ([r for part in parts for r in part.holdout], before.holdout),
        ([c for part in parts for c in part.book.canaries], before.book.canaries),
    ):
        assert Counter[object](found) == Counter(expected)
    assert all(part.people for part in parts)
    assert sum(len(part.people) for part in parts) == len(before.people)
    assert len({content.book.salt for content in (*parts, before)}) == COUNT + 1
    for part, card in zip(parts, cards, strict=True):
        members = {record.unit for record in part.training}
        assert all((canary.unit in members) is canary.planted for canary in part.book.canaries)
        assert (card.units, card.canaries) == (len(members), len(part.book.canaries))
    checked_books(system)


def test_each_block_has_every_limit_of_the_whole(system: System, whole: DatasetCard) -> None:
    system.data.split(whole.name, blocks=COUNT)

    def limits(name: str) -> list[tuple[object, ...]]:
        pools = [pool for pool in system.kernel.budget.pools() if pool.dataset == name]
        return [(p.purpose, p.tenant, p.epsilon, p.delta, p.cap, p.total.unit) for p in pools]

    assert len(limits("clinic")) == 4
    assert all(limits(f"clinic-{n}") == limits("clinic") for n in (1, 2, 3))
    facts = system.budgets.explain("clinic-2")
    assert (facts["block_of"], facts["blocks"]) == ("clinic", [])
    assert "parallel composition" in facts["blocks_do_not_add_up"]
    assert system.budgets.explain("clinic")["blocks"] == ["clinic-1", "clinic-2", "clinic-3"]
    assert "blocks_do_not_add_up" not in system.budgets.explain("notes")


def test_a_job_on_a_block_leaves_the_others_their_budget(
    system: System, whole: DatasetCard
) -> None:
    cards = system.data.split(whole.name, blocks=COUNT)
    for card in cards[:2]:
        system.submit(system.plan(**TRAINING | {"dataset": card.name, "batch": card.units}))
    pools = {pool.id: pool.held_share for pool in system.kernel.budget.pools()}
    assert min(pools["clinic-1"], pools["clinic-2"]) > 0.5  # two on the same people cannot be
    assert (pools["clinic"], pools["clinic-3"]) == (0, 0)
    job = TRAINING | {"dataset": "clinic", "batch": whole.units, "output": "all"}
    with pytest.raises(BudgetExceeded, match=r"clinic-[12] cannot pay"):
        system.submit(system.plan(**job))
    plan = system.plan(**job | {"epsilon": 0.5})
    charged = {pool.id for pool, _ in plan.charges}
    assert charged == {"clinic", "clinic-1", "clinic-2", "clinic-3"}
    checked_books(system)


def test_what_was_cut_off_is_finished_and_only_that(system: System, whole: DatasetCard) -> None:
    with system.kernel.store.transaction() as conn:
        refuse(conn, "INSERT", "datasets", when="NEW.name = 'clinic-2'")
    with pytest.raises(DatabaseRefusal, match="no more"):
        system.data.split(whole.name, blocks=COUNT)
    with system.kernel.store.transaction() as conn:
        allow(conn, "datasets")
    assert names(system) == ["clinic", "clinic-1"]
    made = system.datasets.card("clinic-1")
    with pytest.raises(LedgerConflict, match="another number of blocks"):
        system.data.split(whole.name, blocks=COUNT + 1)
    cards = system.data.split(whole.name, blocks=COUNT)
    assert cards[0] == made
    assert system.data.split(whole.name, blocks=COUNT) == cards  # and nothing is made again
    checked_books(system)


@pytest.mark.parametrize(
    ("dataset", "blocks", "error", "why"),
    [
        ("nobody", 2, UnknownDataset, "nobody"),
        ("clinic", 1, DataError, "2 to 64"),
        ("clinic", 65, DataError, "2 to 64"),
        ("clinic", 64, DataError, "nobody to train on"),
        ("spent", 2, LedgerConflict, "a job was charged to spent already"),
        ("taken", 2, DatasetExists, "'taken-2'"),
    ],
)
def test_what_cannot_be_split_stays_as_it_is(
    system: System,
    whole: DatasetCard,
    tmp_path: Path,
    dataset: str,
    blocks: int,
    error: type[Exception],
    why: str,
) -> None:
    terms: dict[str, Any] = {"unit": "patient_id", "text": "text", "epsilon": 8, "delta": 1e-5}
    terms["holdout"] = 0
    if dataset == "spent":
        card = system.import_data(write_notes(tmp_path / "spent.jsonl"), **terms)
        plan = system.plan(**TRAINING | {"dataset": "spent", "batch": card.units})
        job = system.submit(plan)
        system.jobs.cancel(job)  # gives all of it back; it stays in the books
        assert system.kernel.budget.pool("spent").held == 0
    if dataset == "taken":
        for name in ("taken", "taken-2"):
            system.import_data(write_notes(tmp_path / f"{name}.jsonl"), name=name, **terms)
    before = names(system)
    with pytest.raises(error, match=why):
        system.data.split(dataset, blocks=blocks)
    left = names(system)
    # What is before a taken name was registered: it is whole, and the rest can be made later.
    assert left == sorted([*before, *(["taken-1"] if dataset == "taken" else [])])
    checked_books(system)


def test_a_false_block_is_refused_by_the_catalogue(system: System, whole: DatasetCard) -> None:
    block = Block(whole.name, 1, COUNT)
    records, holdout, book = content(system, whole)
    size = log_size(system)
    with pytest.raises(DataError, match="a unit is not of block 1 of 3"):
        system.datasets.register(
            system.who,
            _terms(whole, block, system.parts),
            records,
            holdout,
            format=whole.format,
            book=book,
        )
    assert names(system) == ["clinic"]
    assert log_size(system) == size + 1  # the failure


def test_who_may_not_import_may_not_split(
    system: System, whole: DatasetCard, home: Path, tmp_path: Path
) -> None:
    close(system)
    developer = hire(home, "dev", "developer", tmp_path)
    with developer.at_work() as theirs, pytest.raises(PermissionDenied):
        theirs.data.split(whole.name, blocks=COUNT)
    with open_home(home) as again:
        assert names(again) == ["clinic"]
        checked_books(again)


def test_the_template_of_canaries_is_in_the_book(system: System, whole: DatasetCard) -> None:
    """A block's canaries are the whole's, secrets and all: nothing is drawn again."""
    card, *_ = system.data.split(whole.name, blocks=2)
    start = DEFAULT_TEMPLATE.partition("{name}")[0]
    assert all(c.prefix.startswith(start) for c in content(system, card).book.canaries)
