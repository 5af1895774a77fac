"""The frozen blocks' outputs, computed once: equal to the model's own, shared beginning or not."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tests.unit.engines.dp.conftest import MakeAdapter, make_records
from torch import nn

from llmos.engines.dp import prefix
from llmos.engines.dp.loss import LanguageModel
from llmos.engines.dp.plan import DPPlan, Performance
from llmos.engines.dp.sampling import TrainingRecord

PLAN = DPPlan(units=4, expected_batch_units=2, steps=8, privacy=None)


def beginning_with(shared: tuple[int, ...]) -> list[TrainingRecord]:
    records = make_records([9, 4, 12, 6], units=[0, 1, 2, 3])
    return [TrainingRecord(r.unit, shared + r.ids, len(shared) + r.labels_from) for r in records]


def own_hidden(body: nn.Module, record: TrainingRecord) -> torch.Tensor:
    with torch.no_grad():
        output = body(input_ids=torch.tensor([record.ids]), use_cache=False)
    hidden: torch.Tensor = output.last_hidden_state[0]
    return hidden


@pytest.mark.parametrize("shared", [(), (5,), (7, 3, 11, 2, 8)])
@pytest.mark.parametrize("microbatch_tokens", [8, 1000])
def test_the_cache_gives_what_the_whole_model_gives(
    make_adapter: MakeAdapter, shared: tuple[int, ...], microbatch_tokens: int
) -> None:
    adapter = make_adapter(layers=4, last_layers=2)
    body = LanguageModel.of(adapter.model).body
    records = beginning_with(shared)
    performance = Performance(microbatch_tokens=microbatch_tokens)
    cache = prefix.build(adapter, body, records, PLAN, performance)
    assert cache is not None
    for number, record in enumerate(records):
        found = cache.body(body, [number])[0]
        assert torch.allclose(found, own_hidden(body, record), atol=1e-4)


@pytest.mark.parametrize(
    ("ids", "shared"),
    [
        ([(1, 2, 3, 4), (1, 2, 3, 9, 9)], 3),
        ([(1, 2, 3), (1, 2, 3, 4)], 2),  # the shorter one keeps a token of its own
        ([(1, 2, 3), (1, 2, 3)], 2),
        ([(4, 2), (1, 2)], 0),
        ([(1, 2), (1, 2, 3), (1, 9, 3)], 1),
    ],
)
def test_what_all_records_begin_with(ids: Sequence[tuple[int, ...]], shared: int) -> None:
    records = [TrainingRecord(n, tokens, len(tokens) - 1) for n, tokens in enumerate(ids)]
    assert prefix._shared_tokens(records) == shared


def test_the_shared_beginning_is_run_once(make_adapter: MakeAdapter) -> None:
    adapter = make_adapter(layers=3, last_layers=1)
    body = LanguageModel.of(adapter.model).body
    tokens: list[int] = []
    handle = body.register_forward_pre_hook(
        lambda _module, _inputs, named: tokens.append(
            named["input_ids"].numel() if "input_ids" in named else 0
        ),
        with_kwargs=True,
    )
    records = beginning_with(tuple(range(1, 31)))
    prefix.build(adapter, body, records, PLAN, Performance(microbatch_tokens=12))
    handle.remove()
    own = sum(len(record.ids) - 30 for record in records)
    longest = max(len(record.ids) for record in records)  # checked against the model at the end
    assert sum(tokens) <= 30 + 2 * own + longest  # padding at most doubles what is their own
