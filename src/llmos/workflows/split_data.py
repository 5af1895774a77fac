"""Split a dataset into blocks that share no person, so that jobs on two of them do not add up."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Final, TypeVar

from llmos.data.canaries import SALT_BYTES, Canary, CanaryBook
from llmos.data.datasets import DatasetCard
from llmos.data.lineage import block_number
from llmos.data.records import Record
from llmos.data.terms import Block, DatasetTerms
from llmos.errors import DataError
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.kernel.pools import Part
from llmos.workflows.parts import Parts

MOST_BLOCKS: Final = 64

OfUnit = TypeVar("OfUnit", Record, Canary)


def run(name: str, blocks: int, who: Principal, parts: Parts) -> tuple[DatasetCard, ...]:
    """Make datasets NAME-1, NAME-2, ... of a dataset's people, each with its own budgets.

    A job on one of them is charged there alone, a job on the whole is charged everywhere. Each is
    registered by an act of its own; after a crash the same command makes those that are missing.

    Raises:
        UnknownDataset: there is none of this name.
        DataError: the number is out of range, or a block would have nobody to train on.
        DatasetExists: a block's name is taken by another dataset.
        ApprovalConflict: an erasure from it waits for its decision.
        LedgerConflict: jobs were charged to it before, or it has another number of blocks.
        PermissionDenied: policy does not let `who` import such datasets.
    """
    if not 1 < blocks <= MOST_BLOCKS:
        raise DataError(f"the number of blocks must be 2 to {MOST_BLOCKS}, not {blocks}")
    card, kernel = parts.datasets.card(name), parts.kernel
    with kernel.monitor.admit(
        who,
        Action.IMPORT_DATA,
        card.resource,
        key=f"split-{name}",
        objects=(card.object_id, card.holdout_object_id, card.canary_object_id),
        charge=None,
        details={"act": "split", "blocks": blocks},
    ) as grant:
        training = list(parts.datasets.open_records(card, grant))
        holdout = list(parts.datasets.open_holdout(card, grant))
        book = parts.datasets.open_canaries(card, grant)

    def grouped(found: Iterable[OfUnit]) -> list[list[OfUnit]]:
        groups: list[list[OfUnit]] = [[] for _ in range(blocks)]
        for item in found:
            unit_name = kernel.vault.keyring.unit_name(name, item.unit)
            groups[block_number(unit_name, blocks) - 1].append(item)
        return groups

    members = grouped(training)
    if [] in members:
        empty = members.index([]) + 1
        raise DataError(
            f"block {empty} of {name} would have nobody to train on", hint="make fewer blocks"
        )
    made = {other.block: other for other in parts.datasets.cards()}
    cards = []
    content = zip(members, grouped(holdout), grouped(book.canaries), strict=True)
    for number, (records, held_out, canaries) in enumerate(content, start=1):
        block = Block(name, number, blocks)
        cards.append(
            made.get(block)
            or parts.datasets.register(
                who,
                _terms(card, block, parts),
                records,
                held_out,
                format=card.format,
                book=CanaryBook(secrets.token_bytes(SALT_BYTES), tuple(canaries)),
            )
        )
    return tuple(cards)


def _terms(card: DatasetCard, block: Block, parts: Parts) -> DatasetTerms:
    """Return the terms of the whole for one block of it: the same limits, for other people."""
    pools = [pool for pool in parts.kernel.budget.pools() if pool.dataset == card.name]
    return DatasetTerms(
        name=f"{card.name}-{block.number}",
        classification=card.classification,
        purposes=card.purposes,
        total=parts.kernel.budget.pool(card.name).total,
        part_epsilons={
            Part(pool.purpose, pool.tenant): pool.epsilon for pool in pools if pool.id != card.name
        },
        parents=card.parents,
        block=block,
    )
