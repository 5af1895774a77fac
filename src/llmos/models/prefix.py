"""What the first blocks of a model make of records, computed once for each record.

Where an adapter is on the last blocks only, what enters them is the same in every step of a
training, and with and without the adapter. Tokens with which all records begin, such as a chat
template's system prompt, are run through once in all.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from llmos.models.blocks import Blocks

_TOLERANCE: Final = 1e-2  # of the model's own output; far above bfloat16's, far below a fault's


class TokenizedRecord(Protocol):
    """A record as a tokenizer sees it."""

    @property
    def ids(self) -> tuple[int, ...]:
        """The whole record's tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """What enters the block at position `first`, for each record (T, d)."""

    blocks: Blocks
    first: int
    hidden: tuple[Tensor, ...]

    def entering(self, records: Sequence[int]) -> Tensor:
        """Return what enters the block for some records (R, T, d), padded on the right."""
        return pad_sequence([self.hidden[record] for record in records], batch_first=True)

    @contextmanager
    def rest(self) -> Iterator[None]:
        """Leave only the blocks from `first` on in the model inside the block."""
        with _only(self.blocks, range(self.first, self.blocks.count)):
            yield

    def body(self, body: nn.Module, records: Sequence[int]) -> Tensor:
        """Return the last hidden states (R, T, d) of some records, padded on the right."""
        with self.rest():
            return _last_hidden(body(inputs_embeds=self.entering(records), use_cache=False))


def size_bytes(body: nn.Module, records: Sequence[TokenizedRecord]) -> int:
    """Return the memory that a prefix of the records takes."""
    weight = next(body.parameters())
    tokens = sum(len(record.ids) for record in records)
    return tokens * int(weight.shape[-1]) * weight.element_size()


def compute(
    blocks: Blocks,
    first: int,
    body: nn.Module,
    records: Sequence[TokenizedRecord],
    *,
    batch_tokens: int,
) -> Prefix | None:
    """Run the blocks below `first` on all records, or return None where that is not exact.

    Some models do more to tokens than looking up their embeddings, so that the rest of the model,
    run from what enters a block, would give something else.

    Args:
        blocks: of the model; those below `first` have no adapter that is to be changed.
        first: position of a block, above 0.
        body: the model without its head.
        records: one or more.
        batch_tokens: most padded tokens in one forward pass; a longer record goes alone.
    """
    weight = next(body.parameters())
    hidden: list[Tensor] = [torch.empty(0)] * len(records)
    shared = _shared_tokens(records)
    by_length = sorted(range(len(records)), key=lambda record: len(records[record].ids))
    with torch.no_grad(), _only(blocks, range(first)), _captured(blocks) as captured:
        start = _run_shared(body, records[0].ids[:shared], weight.device)
        beginning = captured.pop()[0] if shared else weight.new_empty(0, weight.shape[-1])
        while by_length:
            rest = len(records[by_length[-1]].ids) - shared
            count = max(1, batch_tokens // rest)
            part, by_length = by_length[-count:], by_length[:-count]
            rows = [torch.tensor(records[record].ids[shared:]) for record in part]
            ids = pad_sequence(rows, batch_first=True).to(weight.device)
            body(input_ids=ids, **_after(start, len(part)))
            for record, row in zip(part, captured.pop(), strict=True):
                own = row[: len(records[record].ids) - shared]
                hidden[record] = torch.cat([beginning, own])
    prefix = Prefix(blocks, first, tuple(hidden))
    return prefix if _is_exact(prefix, body, records) else None


def _shared_tokens(records: Sequence[TokenizedRecord]) -> int:
    """Count the tokens with which every record begins; each record keeps one of its own."""
    first = min((record.ids for record in records), key=len)
    shared = len(first) - 1
    for record in records:
        while record.ids[:shared] != first[:shared]:
            shared -= 1
    return shared


def _run_shared(body: nn.Module, ids: tuple[int, ...], device: torch.device) -> Any:  # noqa: ANN401
    """Run the shared beginning once and return its keys and values; None if there is none."""
    if not ids:
        return None
    return body(input_ids=torch.tensor([ids], device=device), use_cache=True).past_key_values


def _after(start: Any, rows: int) -> dict[str, Any]:  # noqa: ANN401 - Hugging Face's cache
    """Return the arguments that let `rows` records go on after the shared beginning."""
    if start is None:
        return {"use_cache": False}
    cache = copy.deepcopy(start)
    cache.batch_repeat_interleave(rows)
    return {"past_key_values": cache, "use_cache": True}


def _is_exact(prefix: Prefix, body: nn.Module, records: Sequence[TokenizedRecord]) -> bool:
    """Compare the longest record's path through the cache with the model's own."""
    longest = max(range(len(records)), key=lambda record: len(records[record].ids))
    ids = torch.tensor([records[longest].ids], device=prefix.hidden[longest].device)
    with torch.no_grad():
        expected = _last_hidden(body(input_ids=ids, use_cache=False)).double()
        error = (prefix.body(body, [longest]).double() - expected).norm()
    return bool(error <= _TOLERANCE * expected.norm())


def _last_hidden(output: Any) -> Tensor:  # noqa: ANN401 - Hugging Face's output classes
    hidden: Tensor = output.last_hidden_state
    return hidden


@contextmanager
def _only(blocks: Blocks, kept: range) -> Iterator[None]:
    """Leave only some of the model's blocks in place inside the block."""
    parent_name, _, name = blocks.name.rpartition(".")
    parent = blocks.model.get_submodule(parent_name)
    setattr(parent, name, blocks.modules[kept.start : kept.stop])
    try:
        yield
    finally:
        setattr(parent, name, blocks.modules)


@contextmanager
def _captured(blocks: Blocks) -> Iterator[list[Tensor]]:
    """Collect the outputs of the last block that is in place."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Any) -> None:  # noqa: ANN401
        outputs.append(output[0] if isinstance(output, tuple) else output)

    in_place = blocks.model.get_submodule(blocks.name)
    assert isinstance(in_place, nn.ModuleList)  # noqa: S101 - `find_blocks` found it as one
    handle = in_place[-1].register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()
