"""Datasets: imported as a whole, stored encrypted, opened only under a grant of the monitor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Final

import rfc8785
from sqlalchemy import Connection, RowMapping, Select, insert, select

from llmos.data import erasures, lineage, sealing
from llmos.data.canaries import (
    CanaryBook,
    check,
    commitment,
    decode_book,
    encode_book,
    plant,
)
from llmos.data.holdout import split
from llmos.data.records import Record, RecordFormat, decode_records, fingerprint
from llmos.data.terms import Block, DatasetTerms
from llmos.errors import DatasetExists
from llmos.kernel import caps, schema
from llmos.kernel.identity import Principal
from llmos.kernel.monitor import Monitor
from llmos.kernel.policy import Action, Resource
from llmos.kernel.store import Store, now
from llmos.kernel.vault import ObjectGrant, Vault
from llmos.privacy import Classification

RECORDS_KIND: Final = "records"
HOLDOUT_KIND: Final = "holdout"
CANARIES_KIND: Final = "canaries"


@dataclass(frozen=True, slots=True)
class DatasetCard:
    """What may be known about a dataset without opening it.

    `records` and `units` count what was imported to train on, the planted canaries among them: to
    training and accounting they are records and units like any other. How many were planted is not
    on the card.
    """

    name: str
    format: RecordFormat
    classification: Classification
    purposes: tuple[str, ...]
    unit_column: str
    records: int
    units: int
    holdout_records: int
    holdout_units: int
    characters: int  # of the training records' prompts and completions
    canaries: int  # made, planted or not
    canary_commitment: str  # SHA-256, hex
    fingerprint: str  # SHA-256 of the stored training records, hex; an erasure leaves it
    holdout_fingerprint: str
    object_id: str  # in the vault: training records
    holdout_object_id: str
    canary_object_id: str
    created_at: str
    parents: tuple[str, ...] = ()  # the datasets that it was made from
    block: Block | None = None  # of which dataset it has one of the disjoint parts
    sealed_units: bool = False  # each unit has a key of its own; before, nobody could be erased
    erased_units: int = 0  # of `units`; counted when the card is read, like the next
    erased_holdout_units: int = 0

    @property
    def units_left(self) -> int:
        """The number of units that are trained on now."""
        return self.units - self.erased_units

    @property
    def resource(self) -> Resource:
        """The dataset as policies see it."""
        return _resource(self.name, self.classification, self.purposes)

    def to_dict(self) -> dict[str, Any]:
        """Return the card as JSON values."""
        lists = {"purposes": list(self.purposes), "parents": list(self.parents)}
        block = None if self.block is None else self.block._asdict()
        return asdict(self) | lists | {"block": block}


class Datasets:
    """The catalogue of datasets of one home."""

    def __init__(self, store: Store, vault: Vault, monitor: Monitor) -> None:
        """Keep the parts of the kernel that an import touches."""
        self._store = store
        self._vault = vault
        self._monitor = monitor

    def import_records(
        self,
        who: Principal,
        terms: DatasetTerms,
        records: Iterable[Record],
        *,
        format: RecordFormat,
        book: CanaryBook,
    ) -> DatasetCard:
        """Split, plant, encrypt and register; afterwards all of it stands, or nothing.

        Whole units are held out by independent coins. Planted canaries never are; they are shuffled
        among the training records, so that no position tells. The records are held in memory and
        never written in the clear.

        Raises:
            DatasetExists: the name is taken.
            DataError: no record is left to train on, or a record has a canary's unit.
            PermissionDenied: policy does not let `who` import this dataset.
        """
        with self._store.read() as conn:
            _require_free(conn, terms.name)
        kept, holdout = split(records, terms.holdout_fraction)
        training = plant(book, kept, holdout, format)
        return self.register(who, terms, training, holdout, format=format, book=book)

    def register(
        self,
        who: Principal,
        terms: DatasetTerms,
        training: list[Record],
        holdout: list[Record],
        *,
        format: RecordFormat,
        book: CanaryBook,
    ) -> DatasetCard:
        """Encrypt and register what is split and planted; afterwards all of it stands, or nothing.

        Raises:
            DatasetExists: the name is taken.
            DataError, LedgerConflict, UnknownDataset: its lineage does not allow these terms.
            PermissionDenied: policy does not let `who` import this dataset.
        """
        stored, unit_keys = self._seal(training, terms.name, RECORDS_KIND)
        stored_holdout, holdout_keys = self._seal(holdout, terms.name, HOLDOUT_KIND)
        counts: dict[str, Any] = {
            "records": len(training),
            "units": _units(training),
            "holdout_records": len(holdout),
            "holdout_units": _units(holdout),
            "characters": sum(len(r.prompt) + len(r.completion) for r in training),
            "canaries": len(book.canaries),
            "canary_commitment": commitment(book),
            "fingerprint": fingerprint(stored),
            "holdout_fingerprint": fingerprint(stored_holdout),
        }
        resource = _resource(terms.name, terms.classification, terms.purposes)
        declared: dict[str, Any] = {
            "unit": terms.total.unit.column,
            "classification": str(terms.classification),
            "purposes": list(terms.purposes),
        }
        if terms.block is not None:
            declared["block"] = terms.block._asdict()
        with ExitStack() as undo:  # whatever fails, the commit included, takes the objects with it

            def put(kind: str, content: bytes, keys: Mapping[str, bytes] | None = None) -> str:
                object_id = self._vault.put(kind, content, keys)
                undo.callback(self._vault.delete, object_id)
                return object_id

            with self._monitor.act(
                who, Action.IMPORT_DATA, resource, details={**counts, **declared}, context={}
            ) as conn:
                if terms.block is not None:
                    name_of = partial(self._vault.keyring.unit_name, terms.block.of)
                    units = {record.unit for record in (*training, *holdout)}
                    lineage.require_block(conn, terms.block, map(name_of, units))
                _require_free(conn, terms.name)
                lineage.require_heir(conn, terms)
                card = DatasetCard(
                    name=terms.name,
                    format=format,
                    classification=terms.classification,
                    purposes=terms.purposes,
                    unit_column=terms.total.unit.column,
                    object_id=put(RECORDS_KIND, stored, unit_keys),
                    holdout_object_id=put(HOLDOUT_KIND, stored_holdout, holdout_keys),
                    canary_object_id=put(CANARIES_KIND, encode_book(book)),
                    created_at=now(),
                    parents=terms.parents,
                    block=terms.block,
                    sealed_units=True,
                    **counts,
                )
                conn.execute(insert(schema.datasets).values(_to_row(card)))
                caps.create_pool(conn, terms.name, card.fingerprint, terms.total)
                for part, epsilon in terms.part_epsilons.items():
                    total = replace(terms.total, epsilon=epsilon)
                    caps.create_pool(conn, terms.name, card.fingerprint, total, part)
            undo.pop_all()
        return card

    def card(self, name: str) -> DatasetCard:
        """Return a dataset's card.

        Raises:
            UnknownDataset: there is none of this name.
        """
        with self._store.read() as conn:
            row = conn.execute(_dataset(name)).mappings().one_or_none()
            erased = erasures.counts(conn)
        if row is None:
            raise lineage.unknown(name)
        return _from_row(row, erased)

    def cards(self) -> tuple[DatasetCard, ...]:
        """Return the cards of all datasets by name."""
        query = select(schema.datasets).order_by(schema.datasets.c.name)
        with self._store.read() as conn:
            erased = erasures.counts(conn)
            return tuple(_from_row(row, erased) for row in conn.execute(query).mappings())

    def open_records(self, card: DatasetCard, grant: ObjectGrant) -> Iterator[Record]:
        """Yield the training records, planted canaries among them, in stored order.

        Those of erased units are left out.

        Raises:
            PermissionDenied: the grant does not cover them.
            IntegrityError: they are not what was imported, or a key is gone without an erasure;
                raised at the latest after the last one.
        """
        return self._open(card, RECORDS_KIND, grant)

    def open_holdout(self, card: DatasetCard, grant: ObjectGrant) -> Iterator[Record]:
        """Yield the held-out records; raises as `open_records` does."""
        return self._open(card, HOLDOUT_KIND, grant)

    def open_canaries(self, card: DatasetCard, grant: ObjectGrant) -> CanaryBook:
        """Return the canary book, checked against the commitment of the import.

        Raises:
            PermissionDenied: the grant does not cover it.
            IntegrityError: it is not the book that was committed to.
        """
        book = decode_book(self._vault.read(card.canary_object_id, CANARIES_KIND, grant))
        check(book, card.canary_commitment)
        return book

    def erased(self, card: DatasetCard) -> int:
        """Return how many units the training records have lost by now."""
        with self._store.read() as conn:
            return len(erasures.names(conn, card.object_id))

    def _seal(
        self, records: list[Record], dataset: str, kind: str
    ) -> tuple[bytes, dict[str, bytes]]:
        name_of = partial(self._vault.keyring.unit_name, dataset)
        return sealing.seal_records(records, f"{dataset}|{kind}", name_of)

    def _open(self, card: DatasetCard, kind: str, grant: ObjectGrant) -> Iterator[Record]:
        object_id, expected = card.object_id, card.fingerprint
        if kind == HOLDOUT_KIND:
            object_id, expected = card.holdout_object_id, card.holdout_fingerprint
        with self._vault.open(object_id, kind, grant) as stored:
            if not card.sealed_units:
                yield from decode_records(stored, expected)
                return
            # An erasure is recorded before its key is destroyed: read in this order, no key that
            # is gone is without its record.
            keys = self._vault.units(object_id, grant)
            with self._store.read() as conn:
                erased = erasures.names(conn, object_id)
            place = f"{card.name}|{kind}"
            yield from sealing.open_records(stored, expected, place, keys, erased)


def _units(records: list[Record]) -> int:
    return len({record.unit for record in records})


def _require_free(conn: Connection, name: str) -> None:
    if conn.execute(_dataset(name)).first() is not None:
        raise DatasetExists(
            f"there is a dataset {name!r} already", hint="choose another name; see `llmos data ls`"
        )


def _dataset(name: str) -> Select[*tuple[Any, ...]]:
    return select(schema.datasets).where(schema.datasets.c.name == name)


def _resource(name: str, classification: Classification, purposes: tuple[str, ...]) -> Resource:
    return Resource("Dataset", name, {"classification": classification, "purposes": purposes})


_COLUMNS: Final = tuple(schema.datasets.c.keys())


def _to_row(card: DatasetCard) -> dict[str, str | None]:
    """Give each field its column; what has none goes into the JSON of the column `card`."""
    fields = card.to_dict()
    del fields["erased_units"], fields["erased_holdout_units"]
    rest = {name: value for name, value in fields.items() if name not in _COLUMNS}
    row = {name: value for name, value in fields.items() if name in _COLUMNS}
    lists = {name: rfc8785.dumps(fields[name]).decode() for name in ("purposes", "parents")}
    block_of = None if card.block is None else card.block.of
    return row | lists | {"block_of": block_of, "card": rfc8785.dumps(rest).decode()}


def _from_row(row: RowMapping, erased: Mapping[str, int]) -> DatasetCard:
    fields: dict[str, Any] = dict(row)
    fields |= json.loads(fields.pop("card"))
    block = fields.get("block")
    fields["block"] = None if block is None else Block(**block)
    del fields["block_of"]  # for queries; the card says it too
    fields["format"] = RecordFormat(fields["format"])
    fields["classification"] = Classification(fields["classification"])
    for name in ("purposes", "parents"):
        fields[name] = tuple(json.loads(fields[name]))
    fields["erased_units"] = erased.get(fields["object_id"], 0)
    fields["erased_holdout_units"] = erased.get(fields["holdout_object_id"], 0)
    return DatasetCard(**fields)
