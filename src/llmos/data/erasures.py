"""Which units were erased: written with the decision, before any key is destroyed.

From that moment on readers leave the unit out, whatever keys there still are. A missing key that
no row here explains is a fault and never skipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import rfc8785
from sqlalchemy import Connection, func, insert, select

from llmos.data.tables import erasure_receipts, erasures
from llmos.errors import ApprovalConflict
from llmos.kernel.keyring import KeyName, Keyring
from llmos.kernel.schema import approvals, unit_keys

ACT: Final = "erase"  # of approvals
_NAMES_IN_A_QUERY: Final = 500


@dataclass(frozen=True, slots=True)
class ErasedUnit:
    """A unit whose key in one part of a dataset is destroyed, or about to be."""

    dataset: str
    key: KeyName

    def to_dict(self) -> dict[str, str]:
        """Return the unit as JSON values."""
        return {"dataset": self.dataset, **self.key._asdict()}

    @classmethod
    def from_dict(cls, fields: dict[str, str]) -> ErasedUnit:
        """Read what `to_dict` wrote."""
        return cls(fields["dataset"], KeyName(fields["object_id"], fields["name"]))


def locate(keyring: Keyring, dataset: str, objects: Sequence[str], unit: str) -> KeyName | None:
    """Return which key seals a unit's records in a dataset's objects, also when it is destroyed."""
    c = unit_keys.c
    this = (c.object_id.in_(objects)) & (c.name == keyring.unit_name(dataset, unit))
    with keyring.store.read() as conn:
        found = conn.execute(select(c.object_id, c.name).where(this)).first()
    return None if found is None else KeyName(*found)


def revived(keyring: Keyring, erased: Iterable[KeyName]) -> list[KeyName]:
    """Return those of the erased units' keys that are there; none is, but in a restored backup."""
    c, waiting = unit_keys.c, sorted(erased)
    found: list[KeyName] = []
    with keyring.store.read() as conn:
        for start in range(0, len(waiting), _NAMES_IN_A_QUERY):
            some = waiting[start : start + _NAMES_IN_A_QUERY]
            there = select(c.object_id, c.name).where(
                c.object_id.in_({key.object_id for key in some}),
                c.name.in_({key.name for key in some}),
                c.wrapped_key.is_not(None),
            )
            found += {KeyName(*row) for row in conn.execute(there)} & set(some)
    return found


def record(conn: Connection, approval: str, units: Iterable[ErasedUnit]) -> None:
    """Record that an approval erases units; no reader opens their records any more.

    Raises:
        ApprovalConflict: one of them was erased before.
    """
    for unit in units:
        which = {"object_id": unit.key.object_id, "unit": unit.key.name}
        before = conn.execute(select(erasures.c.approval).filter_by(**which)).scalar()
        if before is not None:
            raise ApprovalConflict(
                f"this person was erased from {unit.dataset} by {before}",
                hint=f"refuse {approval}; `llmos data receipt {before}` writes the receipt",
            )
        conn.execute(insert(erasures).values(**which, dataset=unit.dataset, approval=approval))


def names(conn: Connection, object_id: str) -> frozenset[str]:
    """Return the units that were erased from a part of a dataset."""
    found = select(erasures.c.unit).where(erasures.c.object_id == object_id)
    return frozenset(conn.execute(found).scalars())


def of_dataset(conn: Connection, dataset: str) -> frozenset[str]:
    """Return the units that were erased from any part of a dataset."""
    found = select(erasures.c.unit).where(erasures.c.dataset == dataset)
    return frozenset(conn.execute(found).scalars())


def waiting(conn: Connection, dataset: str) -> str | None:
    """Return an approval to erase someone from a dataset that nobody has decided yet, if any."""
    c = approvals.c
    undecided = select(c.id, c.request).where((c.act == ACT) & (c.state == "open"))
    for approval, request in conn.execute(undecided):
        if any(unit["dataset"] == dataset for unit in json.loads(request)["units"]):
            return str(approval)
    return None


def counts(conn: Connection) -> dict[str, int]:
    """Return how many units were erased from each part of a dataset that lost any."""
    counted = select(erasures.c.object_id, func.count()).group_by(erasures.c.object_id)
    return {object_id: count for object_id, count in conn.execute(counted)}


def approval_of(conn: Connection, key: KeyName) -> str | None:
    """Return which approval erased a unit, if one did."""
    which = (erasures.c.object_id == key.object_id) & (erasures.c.unit == key.name)
    return conn.execute(select(erasures.c.approval).where(which)).scalar()


def units(conn: Connection, approval: str) -> tuple[ErasedUnit, ...]:
    """Return the units that an approval erases."""
    query = select(erasures).where(erasures.c.approval == approval)
    rows = conn.execute(query.order_by(erasures.c.dataset, erasures.c.unit)).all()
    return tuple(ErasedUnit(row.dataset, KeyName(row.object_id, row.unit)) for row in rows)


def keys(conn: Connection) -> dict[KeyName, str]:
    """Return every key that was ever to be destroyed, with its approval."""
    rows = conn.execute(select(erasures.c.object_id, erasures.c.unit, erasures.c.approval))
    return {KeyName(object_id, unit): approval for object_id, unit, approval in rows}


def unfinished(conn: Connection) -> tuple[str, ...]:
    """Return the approved erasures that have no receipt yet."""
    receipted = select(erasure_receipts.c.approval)
    query = select(erasures.c.approval).where(erasures.c.approval.not_in(receipted)).distinct()
    return tuple(conn.execute(query.order_by(erasures.c.approval)).scalars())


def keep_receipt(conn: Connection, approval: str, envelope: dict[str, Any]) -> None:
    """Keep the signed receipt of an erasure.

    Raises:
        ApprovalConflict: another process has finished it.
    """
    if receipt(conn, approval) is not None:
        raise ApprovalConflict(f"{approval} has its receipt already")
    text = rfc8785.dumps(envelope).decode()
    conn.execute(insert(erasure_receipts).values(approval=approval, envelope=text))


def receipt(conn: Connection, approval: str) -> dict[str, Any] | None:
    """Return the signed receipt of an erasure, if it is finished."""
    query = select(erasure_receipts.c.envelope).where(erasure_receipts.c.approval == approval)
    text = conn.execute(query).scalar()
    return None if text is None else dict(json.loads(text))
