"""Propose to erase a person; another one's decision does it, and `shred` finishes it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, select

from llmos.data import erasures
from llmos.data.datasets import DatasetCard
from llmos.data.erasures import ErasedUnit
from llmos.data.importers import normalized_unit
from llmos.errors import ApprovalConflict, DataError
from llmos.kernel import schema
from llmos.kernel.approvals import Approval
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.workflows.parts import Parts


def run(
    unit: str,
    reason: str,
    who: Principal,
    parts: Parts,
    *,
    datasets: Sequence[str] = (),
    column: str | None = None,
) -> Approval:
    """Propose to erase a person; nothing changes before someone else approves.

    Args:
        unit: the person's value of the unit column.
        reason: kept in the log for ever, so it may not name the person.
        who: who proposes it.
        parts: the home.
        datasets: where to erase, with their blocks; none: every dataset that holds the person.
        column: only datasets whose unit column has this name.

    Raises:
        UnknownDataset: there is none of a name.
        DataError: nobody is named, the reason names the person, no dataset holds them, unit columns
            of several names do, or a dataset is too old to erase from.
        ApprovalConflict: there is no reason, the person was erased before, or a dataset was made
            while this looked for the person.
        PermissionDenied: policy does not let `who` erase from one of these datasets.
    """
    unit = normalized_unit(unit)
    _check_texts(unit, reason)
    known = {card.name for card in parts.datasets.cards()}
    found = _find(unit, _cards(datasets, column, who, parts), parts)
    request = {"units": [erased.to_dict() for erased in found]}
    subject = f"one person from {', '.join(sorted({erased.dataset for erased in found}))}"
    details: dict[str, Any] = dict(request)
    kernel = parts.kernel
    with kernel.monitor.act(who, Action.ERASE_DATA, kernel.home, details=details) as conn:
        if set(conn.execute(select(schema.datasets.c.name)).scalars()) != known:
            raise ApprovalConflict("a dataset was made just now", hint="propose it again")
        asked = kernel.approvals.propose(conn, who, erasures.ACT, subject, request, reason)
        details |= {"approval": asked.id, "reason": reason}
    return asked


def perform(conn: Connection, approved: Approval) -> None:
    """Record which units are erased, in the transaction of the approval; `shred` does the rest.

    Raises:
        ApprovalConflict: the person was erased before.
    """
    units = [ErasedUnit.from_dict(fields) for fields in approved.request["units"]]
    erasures.record(conn, approved.id, units)


def _check_texts(unit: str, reason: str) -> None:
    if not unit:
        raise DataError("nobody is named", hint="give the person's value of the unit column")
    if re.search(rf"(?<!\w){re.escape(unit)}(?!\w)", reason, re.IGNORECASE):
        raise DataError(
            "the reason names the person; it would stay in the log for ever",
            hint="refer to the request by its number or date",
        )


def _cards(
    datasets: Sequence[str], column: str | None, who: Principal, parts: Parts
) -> list[DatasetCard]:
    """Return the datasets to look in; whoever may not erase from one learns nothing about it."""
    catalogue = parts.datasets
    cards = [catalogue.card(name) for name in datasets]
    for card in cards:  # also over those that are added: a block may be split again
        cards += [c for c in catalogue.cards() if c.block is not None and c.block.of == card.name]
    cards = list({card.name: card for card in cards}.values()) or list(catalogue.cards())
    cards = [card for card in cards if column in (None, card.unit_column)]
    for card in cards:
        parts.kernel.monitor.authorize(who, Action.ERASE_DATA, card.resource)
        if not card.sealed_units:
            raise DataError(
                f"{card.name} was imported before people could be erased from a dataset",
                hint="import its file anew to erase from the new dataset; name the datasets to "
                "leave this one out",
            )
    return cards


def _find(unit: str, cards: Sequence[DatasetCard], parts: Parts) -> list[ErasedUnit]:
    """Return the keys of a person's records, one for each dataset that holds any."""
    keyring = parts.kernel.vault.keyring
    located = [
        (card, erasures.locate(keyring, card.name, (card.object_id, card.holdout_object_id), unit))
        for card in cards
    ]
    found = [(card, key) for card, key in located if key is not None]
    columns = sorted({card.unit_column for card, _ in found})
    if len(columns) > 1:
        raise DataError(
            f"this name stands in the columns {', '.join(columns)} of several datasets, where it "
            "may mean different people",
            hint="choose one with --column, or name the datasets",
        )
    with parts.kernel.store.read() as conn:
        before = {key: erasures.approval_of(conn, key) for _, key in found}
    left = [ErasedUnit(card.name, key) for card, key in found if before[key] is None]
    if left:
        return left
    if done := sorted({approval for approval in before.values() if approval is not None}):
        raise ApprovalConflict(
            f"this person was erased before, by {', '.join(done)}",
            hint=f"`llmos data receipt {done[-1]}` writes the receipt",
        )
    raise DataError(
        "no dataset holds this person", hint="it is the value of the unit column that counts"
    )
