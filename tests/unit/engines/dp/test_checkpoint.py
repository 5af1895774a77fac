"""Checkpoints: exact, and tied to their plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmos.engines.dp.checkpoint import decode, encode
from llmos.engines.dp.optimizer import TrainingState
from llmos.engines.dp.plan import DPPlan, GaussianClipping
from llmos.errors import EngineError

PLAN = DPPlan(10, 5, 3, GaussianClipping(1, 1))
STATE = TrainingState(2, torch.arange(4.0), torch.rand(4), torch.rand(4))
CHECKPOINT = encode(STATE, PLAN, self_tested=True)


def test_round_trip_is_exact() -> None:
    again = decode(CHECKPOINT, PLAN, parameters=4, device="cpu").state
    assert again.step == 2
    for name in ("weights", "first_moment", "second_moment"):
        assert torch.equal(getattr(again, name), getattr(STATE, name))


@pytest.mark.parametrize("tested", [True, False])
def test_whether_the_engine_was_tested_is_kept(tested: bool) -> None:
    written = encode(STATE, PLAN, self_tested=tested)
    assert decode(written, PLAN, parameters=4, device="cpu").self_tested is tested


def test_another_plan_is_refused() -> None:
    weaker = replace(PLAN, privacy=GaussianClipping(1, 0.9))
    for other in (weaker, replace(PLAN, steps=4), replace(PLAN, privacy=None)):
        with pytest.raises(EngineError, match="another plan"):
            decode(CHECKPOINT, other, parameters=4, device="cpu")


def test_another_adapter_is_refused() -> None:
    with pytest.raises(EngineError, match="another shape"):
        decode(CHECKPOINT, PLAN, parameters=5, device="cpu")


@pytest.mark.parametrize("cut", [0, 5, 40, -1])
def test_damaged_bytes_are_refused(cut: int) -> None:
    with pytest.raises(EngineError, match="cannot be read"):
        decode(CHECKPOINT[:cut], PLAN, parameters=4, device="cpu")
