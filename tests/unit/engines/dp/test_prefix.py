"""When the frozen blocks below an adapter are run once for each record."""

from __future__ import annotations

import pytest
import torch
from tests.unit.engines.dp.conftest import MakeAdapter, make_records

from llmos.engines.dp import prefix
from llmos.engines.dp.loss import LanguageModel
from llmos.engines.dp.plan import DPPlan, Performance
from llmos.models.prefix import size_bytes

RECORDS = make_records([9, 4, 12, 6], units=[0, 1, 2, 3])
PLAN = DPPlan(units=4, expected_batch_units=2, steps=8, privacy=None)
FEW_STEPS = DPPlan(units=4, expected_batch_units=2, steps=3, privacy=None)


def test_what_enters_the_adapter_is_kept_and_gives_what_the_whole_model_gives(
    make_adapter: MakeAdapter,
) -> None:
    adapter = make_adapter(layers=4, last_layers=2)
    body = LanguageModel.of(adapter.model).body
    kept = prefix.build(adapter, body, RECORDS, PLAN, Performance())
    assert kept is not None
    assert kept.first == 2
    for number, record in enumerate(RECORDS):
        with torch.no_grad():
            own = body(input_ids=torch.tensor([record.ids]), use_cache=False).last_hidden_state
        assert torch.allclose(kept.body(body, [number]), own, atol=1e-4)


@pytest.mark.parametrize(
    ("last_layers", "plan", "room"),
    [
        (None, PLAN, 0),  # all blocks are adapted
        (2, FEW_STEPS, 0),  # each record is read one and a half times
        (2, PLAN, -1),  # a byte too large
    ],
)
def test_what_does_not_pay_is_not_kept(
    make_adapter: MakeAdapter, last_layers: int | None, plan: DPPlan, room: int
) -> None:
    adapter = make_adapter(layers=4, last_layers=last_layers)
    body = LanguageModel.of(adapter.model).body
    performance = Performance(prefix_cache_bytes=size_bytes(body, RECORDS) + room)
    assert prefix.build(adapter, body, RECORDS, plan, performance) is None
