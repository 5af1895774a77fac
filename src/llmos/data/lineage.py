"""Where a dataset comes from: what it was made from, or whose block it is."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Final

from sqlalchemy import Connection, select

from llmos.data import erasures
from llmos.data.terms import Block, DatasetTerms
from llmos.errors import ApprovalConflict, DataError, LedgerConflict, UnknownDataset
from llmos.kernel.schema import budget_costs, budget_pools, datasets
from llmos.privacy import Classification

_SENSITIVITY: Final = (Classification.PUBLIC, Classification.SYNTHETIC, Classification.SENSITIVE)


def unknown(name: str) -> UnknownDataset:
    """Return the error that there is no dataset of this name."""
    return UnknownDataset(f"there is no dataset {name!r}", hint="see `llmos data ls`")


def require_heir(conn: Connection, terms: DatasetTerms) -> None:
    """Refuse terms under which derived data would be less protected than what it was made from.

    Raises:
        UnknownDataset: there is no such parent.
        DataError: another unit, a wider purpose or a milder classification than a parent's.
    """
    for name in terms.parents:
        parent = conn.execute(select(datasets).where(datasets.c.name == name)).one_or_none()
        if parent is None:
            raise unknown(name)
        unit = terms.total.unit.column
        wider = set(terms.purposes) - set(json.loads(parent.purposes))
        if parent.unit_column != unit:
            raise DataError(f"{name} protects each {parent.unit_column}, not each {unit}")
        if wider:
            raise DataError(
                f"{name} may not be used for {', '.join(sorted(wider))}",
                hint="derived data inherit the purposes of what they were made from",
            )
        classified = Classification(parent.classification)
        if _SENSITIVITY.index(terms.classification) < _SENSITIVITY.index(classified):
            raise DataError(
                f"what is made from {name} is {classified} as well",
                hint="the output of a private mechanism is no derived data: leave the parent out",
            )


def block_number(unit_name: str, blocks: int) -> int:
    """Return the block, from 1, that a unit is in: by a keyed hash of who it is alone.

    That hash (`Keyring.unit_name`) must not depend on anybody else's data. With a hash that did,
    such as one of the file, adding one person would move others between the blocks, and the losses
    of two blocks would add up.
    """
    return int(unit_name, 16) % blocks + 1


def require_block(conn: Connection, block: Block, unit_names: Iterable[str]) -> None:
    """Refuse a block that may share a person with another one, or whose people lost something.

    Nor may a block bring back who was erased from the whole while it was split, or is about to be:
    an erasure lists the datasets when it is proposed.

    Raises:
        LedgerConflict: a job was charged to the whole before, or it has another number of blocks.
        ApprovalConflict: an erasure from the whole waits for its decision.
        DataError: a unit is not of this block, or was erased.
    """
    charged = select(budget_costs.c.pool).join(budget_pools).limit(1)
    if conn.execute(charged.where(budget_pools.c.dataset == block.of)).first() is not None:
        raise LedgerConflict(
            f"a job was charged to {block.of} already; its blocks would forget what it cost",
            hint="split a dataset before the first private training on it",
        )
    siblings = select(datasets.c.name, datasets.c.card).where(datasets.c.block_of == block.of)
    for name, card in conn.execute(siblings):
        if json.loads(card)["block"]["blocks"] != block.blocks:
            raise LedgerConflict(
                f"{block.of} has been split already; {name} has another number of blocks",
                hint="`llmos data ls` shows the blocks",
            )
    if (approval := erasures.waiting(conn, block.of)) is not None:
        raise ApprovalConflict(
            f"{approval} is to erase someone from {block.of}; decide it first",
            hint=f"llmos approval show {approval}",
        )
    units = frozenset(unit_names)
    if units & erasures.of_dataset(conn, block.of):
        raise DataError(f"someone was erased from {block.of} meanwhile", hint="split it again")
    if any(block_number(name, block.blocks) != block.number for name in units):
        raise DataError(f"a unit is not of block {block.number} of {block.blocks} of {block.of}")
