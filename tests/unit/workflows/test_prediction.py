from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tests.homes import TRAINING

from llmos.engines.dp.plan import Performance
from llmos.jobs.jobs import JobState
from llmos.system import System
from llmos.workflows import prediction
from llmos.workflows.prediction import Prediction, matmul_flops_per_s


def predicted(system: System, **changes: Any) -> Prediction:
    plan = system.plan(**(TRAINING | changes))
    return plan.predicted


def test_a_prediction_says_minutes_and_what_it_rests_on() -> None:
    assert str(Prediction(125.4, "a guess")) == "about 2 min 05 s (a guess)"


def test_the_speed_of_this_machine_is_measured() -> None:
    assert matmul_flops_per_s(torch.device("cpu")) > 1e6


def test_without_history_the_prediction_is_an_estimate(system: System) -> None:
    assert "estimated" in predicted(system).basis


def test_what_the_frozen_blocks_cost_does_not_grow_with_the_steps(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = 1e6 / 0.55  # so that 1e6 operations a second remain
    monkeypatch.setattr(prediction, "matmul_flops_per_s", lambda _device: speed)

    def once_s(last_layers: int | None) -> float:
        short = predicted(system, last_layers=last_layers).seconds
        return 2 * short - predicted(system, last_layers=last_layers, steps=16).seconds

    # one frozen block: its attention and MLP, 24 notes of about 23 characters, forward
    weights = 64 * 64 * 3 + 3 * 64 * 96
    assert once_s(1) - once_s(None) == pytest.approx(2 * weights * 24 * 23 / 3.5 / 1e6, rel=0.05)


def test_frozen_blocks_that_are_not_kept_run_in_every_step(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "matmul_flops_per_s", lambda _device: 1e6 / 0.55)

    def slower_s() -> float:
        frozen, none = (predicted(system, last_layers=last).seconds for last in (1, None))
        return none - frozen

    kept = slower_s()
    monkeypatch.setattr(prediction, "Performance", partial(Performance, prefix_cache_bytes=1))
    # instead of once for the 24 notes, 8 times for each with its start token
    per_token_s = 2 * (64 * 64 * 3 + 3 * 64 * 96) / 1e6
    more_tokens = 24 * (8 * (23 / 3.5 + 1) - 23 / 3.5)
    assert kept - slower_s() == pytest.approx(more_tokens * per_token_s, rel=0.05)


def finish(system: System, tokens_per_s: float, **changes: Any) -> None:
    """Enter a job as done at a certain speed."""
    plan = system.plan(**(TRAINING | {"output": f"at-{tokens_per_s:g}"} | changes))
    job = system.parts.jobs.job(system.submit(plan))
    with system.kernel.store.transaction() as conn:
        system.kernel.budget.abort(conn, job.id)
        system.parts.jobs.finish(conn, job, JobState.DONE, {"tokens_per_s": tokens_per_s})


def test_an_earlier_run_like_it_predicts_the_next_in_proportion_to_its_work(
    system: System,
) -> None:
    finish(system, 100.0)
    once, twice = predicted(system), predicted(system, steps=16)
    assert "100 tokens/s in an earlier run" in once.basis
    start = 2 * once.seconds - twice.seconds
    assert once.seconds - start == pytest.approx((twice.seconds - start) / 2)
    assert once.seconds > start > 0
    # 24 notes of about 23 characters and a start token, 8 times, at 100 tokens a second
    assert once.seconds - start == pytest.approx(8 * 24 * (23 / 3.5 + 1) / 100, rel=0.05)


def test_only_the_same_model_and_shape_and_a_known_speed_count(system: System) -> None:
    finish(system, 100.0, rank=8)
    finish(system, 0.0)
    assert "estimated" in predicted(system).basis
    finish(system, 100.0)
    finish(system, 50.0)
    assert "50 tokens/s" in predicted(system).basis  # the newest counts
