"""The frozen blocks below the adapter, computed once for each record instead of in every step.

With an adapter on the last blocks only, what enters them never changes during training. It is kept
for all records if it fits the allowed memory and is read at least twice on average. Tokens with
which all records begin, such as a chat template's system prompt, are run through once in all.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from llmos.engines.dp.plan import DPPlan, Performance
from llmos.engines.dp.sampling import TrainingRecord
from llmos.models.lora import LoraAdapter

_TOLERANCE: Final = 1e-2  # of the model's own output; far above bfloat16's, far below a fault's
_MIN_PASSES: Final = 2.0


@dataclass(frozen=True, slots=True, eq=False)
class PrefixCache:
    """What enters the first adapted block, for each record (T, d)."""

    adapter: LoraAdapter
    hidden: tuple[Tensor, ...]

    def body(self, body: nn.Module, records: Sequence[int]) -> Tensor:
        """Return the last hidden states (R, T, d) of some records, padded on the right."""
        entering = pad_sequence([self.hidden[record] for record in records], batch_first=True)
        with _only(self.adapter, self.adapter.adapted_blocks):
            return _last_hidden(body(inputs_embeds=entering, use_cache=False))


def pays(size_bytes: int, passes: float, performance: Performance) -> bool:
    """Say whether outputs of that size, read `passes` times on average, are worth keeping."""
    return size_bytes <= performance.prefix_cache_bytes and passes >= _MIN_PASSES


def build(
    adapter: LoraAdapter,
    body: nn.Module,
    records: Sequence[TrainingRecord],
    plan: DPPlan,
    performance: Performance,
) -> PrefixCache | None:
    """Compute the cache, or return None where it would not fit, not pay or not be exact."""
    first = adapter.adapted_blocks.start
    weight = next(body.parameters())
    size = sum(len(record.ids) for record in records) * weight.shape[-1] * weight.element_size()
    passes = plan.steps * plan.sampling_probability
    if first == 0 or not pays(size, passes, performance):
        return None
    hidden: list[Tensor] = [torch.empty(0)] * len(records)
    shared = _shared_tokens(records)
    by_length = sorted(range(len(records)), key=lambda record: len(records[record].ids))
    with torch.no_grad(), _only(adapter, range(first)), _captured(adapter) as captured:
        start = _run_shared(body, records[0].ids[:shared], weight.device)
        beginning = captured.pop()[0] if shared else weight.new_empty(0, weight.shape[-1])
        while by_length:
            rest = len(records[by_length[-1]].ids) - shared
            count = max(1, performance.microbatch_tokens // rest)
            part, by_length = by_length[-count:], by_length[:-count]
            rows = [torch.tensor(records[record].ids[shared:]) for record in part]
            ids = pad_sequence(rows, batch_first=True).to(weight.device)
            body(input_ids=ids, **_after(start, len(part)))
            for record, row in zip(part, captured.pop(), strict=True):
                own = row[: len(records[record].ids) - shared]
                hidden[record] = torch.cat([beginning, own])
    cache = PrefixCache(adapter, tuple(hidden))
    return cache if _is_exact(cache, body, records) else None


def _shared_tokens(records: Sequence[TrainingRecord]) -> int:
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


def _is_exact(cache: PrefixCache, body: nn.Module, records: Sequence[TrainingRecord]) -> bool:
    """Compare the longest record's path through the cache with the model's own."""
    longest = max(range(len(records)), key=lambda record: len(records[record].ids))
    ids = torch.tensor([records[longest].ids], device=cache.hidden[longest].device)
    with torch.no_grad():
        expected = _last_hidden(body(input_ids=ids, use_cache=False)).double()
        error = (cache.body(body, [longest]).double() - expected).norm()
    return bool(error <= _TOLERANCE * expected.norm())


def _last_hidden(output: Any) -> Tensor:  # noqa: ANN401 - Hugging Face's output classes
    hidden: Tensor = output.last_hidden_state
    return hidden


@contextmanager
def _only(adapter: LoraAdapter, kept: range) -> Iterator[None]:
    """Leave only some of the model's blocks in place inside the block."""
    parent_name, _, name = adapter.blocks.rpartition(".")
    parent = adapter.model.get_submodule(parent_name)
    blocks = adapter.model.get_submodule(adapter.blocks)
    assert isinstance(blocks, nn.ModuleList)  # noqa: S101 - `attach` found it as one
    setattr(parent, name, blocks[kept.start : kept.stop])
    try:
        yield
    finally:
        setattr(parent, name, blocks)


@contextmanager
def _captured(adapter: LoraAdapter) -> Iterator[list[Tensor]]:
    """Collect the outputs of the block below the first adapted one."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Any) -> None:  # noqa: ANN401
        outputs.append(output[0] if isinstance(output, tuple) else output)

    blocks = adapter.model.get_submodule(adapter.blocks)
    assert isinstance(blocks, nn.ModuleList)  # noqa: S101 - `attach` found it as one
    handle = blocks[-1].register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()
