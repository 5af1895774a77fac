"""The loop: what it releases, what it never depends on, and how it stops and goes on."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from scipy import stats
from tests.unit.engines.dp.conftest import MakeAdapter, make_records
from torch import Tensor, nn

from llmos.engines.dp import selftest
from llmos.engines.dp.loss import losses
from llmos.engines.dp.plan import AdamWSettings, DPPlan, GaussianClipping, Performance
from llmos.engines.dp.randomness import Randomness, RandomnessSource
from llmos.engines.dp.sampling import TrainingRecord
from llmos.engines.dp.trainer import FitResult, StepReport, fit
from llmos.errors import EngineError, SelfTestFailed
from llmos.models.lora import LoraAdapter, Parametrisation

RECORDS = make_records([24, 12, 21, 5, 24, 9, 17, 30], [0, 1, 2, 3, 4, 0, 5, 0])
PLAN = DPPlan(
    units=6,
    expected_batch_units=3,
    steps=6,
    privacy=GaussianClipping(0.5, 0.8),
    max_records_per_unit=2,
    optimizer=AdamWSettings(learning_rate=1e-2),
)
SEEDED = Randomness.insecure_test(0)


def train(adapter: LoraAdapter, plan: DPPlan = PLAN, **options: Any) -> tuple[Tensor, FitResult]:
    result = fit(adapter, RECORDS, plan, **{"randomness": SEEDED, **options})
    return adapter.vector(), result


def test_result_says_what_was_run(make_adapter: MakeAdapter) -> None:
    reports: list[StepReport] = []
    adapter = make_adapter()
    before = adapter.vector()
    after, result = train(adapter, on_step=reports.append, randomness=Randomness.fresh())
    assert result.mechanism_run == PLAN.mechanism
    assert result.finished
    assert result.randomness is RandomnessSource.OPERATING_SYSTEM
    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6]
    assert result.tokens == sum(report.tokens for report in reports)
    assert not torch.equal(after, before)


def test_seeded_runs_repeat_and_fresh_ones_do_not(make_adapter: MakeAdapter) -> None:
    seeded = [train(make_adapter()) for _ in range(2)]
    assert torch.equal(seeded[0][0], seeded[1][0])
    assert seeded[0][1].randomness is RandomnessSource.INSECURE_TEST
    fresh = [train(make_adapter(), randomness=None)[0] for _ in range(2)]
    assert not torch.equal(*fresh)


@pytest.mark.parametrize(
    "performance",
    [
        Performance(microbatch_tokens=1),
        Performance(microbatch_tokens=40),
        Performance(microbatch_tokens=10_000, threads=2),
        Performance(prefix_cache_bytes=0),
    ],
)
def test_performance_changes_neither_mechanism_nor_outcome(
    make_adapter: MakeAdapter, performance: Performance
) -> None:
    usual, usual_result = train(make_adapter(last_layers=1))
    weights, result = train(make_adapter(last_layers=1), performance=performance)
    assert result.mechanism_run == usual_result.mechanism_run == PLAN.mechanism
    torch.testing.assert_close(weights, usual, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("privacy", [PLAN.privacy, None])
@pytest.mark.parametrize("stop_after", [1, 4])
def test_resumed_equals_uninterrupted_bit_for_bit(
    make_adapter: MakeAdapter, privacy: GaussianClipping | None, stop_after: int
) -> None:
    plan = replace(PLAN, privacy=privacy)
    whole, _ = train(make_adapter(), plan)
    saved: list[tuple[bytes, int]] = []
    done: list[StepReport] = []
    _, result = train(
        make_adapter(),
        plan,
        on_step=done.append,
        stop=lambda: len(done) == stop_after,
        save=lambda checkpoint, steps: saved.append((checkpoint, steps)),
    )
    assert not result.finished
    assert [steps for _, steps in saved] == [stop_after] == [result.steps]
    if privacy is not None:
        assert result.mechanism_run == PoissonRun(stop_after)
    resumed, result = train(make_adapter(), plan, resume=saved[0][0])
    assert result.steps == plan.steps
    assert torch.equal(resumed, whole)


@pytest.mark.parametrize("kind", [Parametrisation.FFA, Parametrisation.SB])
def test_other_parametrisations_train_and_resume_bit_for_bit(
    make_adapter: MakeAdapter, kind: Parametrisation
) -> None:
    adapter = make_adapter(last_layers=1, parametrisation=kind)
    frozen = [p.clone() for p in adapter.model.parameters() if not p.requires_grad]
    saved: list[bytes] = []
    whole, result = train(adapter, save=lambda made, _: saved.append(made), save_every_s=0.0)
    assert result.self_tested
    now = [p for p in adapter.model.parameters() if not p.requires_grad]
    assert all(map(torch.equal, now, frozen))
    resumed, _ = train(make_adapter(last_layers=1, parametrisation=kind), resume=saved[2])
    assert torch.equal(resumed, whole)


def PoissonRun(steps: int) -> object:  # noqa: N802 - reads as the value it makes
    mechanism = PLAN.mechanism
    assert mechanism is not None
    return mechanism.after(steps)


def test_checkpoints_come_in_time_and_at_the_end(make_adapter: MakeAdapter) -> None:
    steps: list[int] = []
    train(make_adapter(), save=lambda _, done: steps.append(done), save_every_s=0.0)
    assert steps == [1, 2, 3, 4, 5, 6]
    train(make_adapter(), save=lambda _, done: steps.append(done), save_every_s=1e9)
    assert steps == [1, 2, 3, 4, 5, 6, 6]


def test_a_finished_checkpoint_needs_no_step(make_adapter: MakeAdapter) -> None:
    saved: list[bytes] = []
    whole, _ = train(make_adapter(), save=lambda checkpoint, _: saved.append(checkpoint))
    weights, result = train(make_adapter(), resume=saved[-1])
    assert torch.equal(weights, whole)
    assert (result.steps, result.tokens, result.finished) == (6, 0, True)
    assert result.self_tested  # by the run that made the checkpoint


def test_resuming_under_another_plan_is_refused(make_adapter: MakeAdapter) -> None:
    saved: list[bytes] = []
    train(make_adapter(), save=lambda checkpoint, _: saved.append(checkpoint))
    with pytest.raises(EngineError, match="another plan"):
        train(make_adapter(), replace(PLAN, steps=7), resume=saved[0])


def test_an_empty_batch_is_a_step_of_noise_alone(make_adapter: MakeAdapter) -> None:
    plan = replace(PLAN, expected_batch_units=1e-9, steps=1)
    reports: list[StepReport] = []
    adapter = make_adapter()
    before = adapter.vector()
    after, result = train(adapter, plan, on_step=reports.append)
    assert (reports[0].tokens, reports[0].mean_loss) == (0, None)
    assert result.steps == 1
    assert bool((after != before).double().mean() > 0.99)  # every coordinate got noise


def test_every_step_draws_noise_of_its_own(make_adapter: MakeAdapter) -> None:
    settings = AdamWSettings(beta1=0.0, beta2=0.0, warmup=0.0, final_rate=1.0)
    plan = replace(PLAN, expected_batch_units=1e-9, steps=3, optimizer=settings)
    adapter = make_adapter()
    weights = [adapter.vector()]
    train(adapter, plan, on_step=lambda _: weights.append(adapter.vector()))
    moves = torch.stack([after - before for before, after in pairwise(weights)])
    bound = 6 / math.sqrt(moves.shape[1])  # six standard deviations of a correlation
    assert (torch.corrcoef(moves) - torch.eye(3)).abs().max() < bound


def test_training_without_privacy_learns(make_adapter: MakeAdapter) -> None:
    plan = replace(PLAN, privacy=None, steps=60, expected_batch_units=6)
    reports: list[StepReport] = []
    _, result = train(make_adapter(), plan, on_step=reports.append)
    assert result.mechanism_run is None
    seen = [report.mean_loss for report in reports if report.mean_loss is not None]
    assert seen[-1] < 0.7 * seen[0]


def test_prefix_cache_changes_nothing_and_is_used(
    make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(PLAN, steps=12)
    without, _ = train(
        make_adapter(layers=3, last_layers=1), plan, performance=Performance(prefix_cache_bytes=0)
    )
    adapter = make_adapter(layers=3, last_layers=1)
    runs: list[int] = []
    blocks = adapter.model.get_submodule(adapter.blocks)
    assert isinstance(blocks, nn.ModuleList)
    blocks[0].register_forward_hook(lambda *_: runs.append(1))
    weights, _ = train(adapter, plan)
    assert len(runs) <= 5  # the cache in one pass, its check, and two records of the self-test
    assert adapter.model.get_submodule(adapter.blocks) is blocks
    torch.testing.assert_close(weights, without, rtol=1e-3, atol=1e-4)


def test_self_test_stops_a_wrong_engine_before_the_first_step(
    make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter()
    before = adapter.vector()

    def wrong(*arguments: Any) -> tuple[Tensor, Tensor]:
        objective, per_record = losses(*arguments)
        return objective * 1.01, per_record

    monkeypatch.setattr("llmos.engines.dp.trainer.losses", wrong)
    with pytest.raises(SelfTestFailed, match="ordinary autograd says"):
        train(adapter, replace(PLAN, expected_batch_units=6))
    assert torch.equal(adapter.vector(), before)


def test_self_test_knows_a_head_that_is_more_than_linear(make_adapter: MakeAdapter) -> None:
    """Models that cap or scale their logits would train on another function than they serve."""
    adapter = make_adapter()
    adapter.model.register_forward_hook(_cap_logits)
    with pytest.raises(SelfTestFailed):
        train(adapter, replace(PLAN, expected_batch_units=6))


def _cap_logits(_model: nn.Module, _inputs: object, output: Any) -> Any:
    output.logits = 3 * torch.tanh(output.logits / 3)
    return output


def test_divergence_is_an_error(make_adapter: MakeAdapter) -> None:
    settings = AdamWSettings(learning_rate=1e30, warmup=0.0)
    plan = replace(PLAN, privacy=None, optimizer=settings)
    with pytest.raises(EngineError, match="diverged"):
        train(make_adapter(), plan)


def test_only_the_latest_state_is_kept(make_adapter: MakeAdapter) -> None:
    adapter = make_adapter()
    size = adapter.vector().numel()
    kept: list[int] = []

    def count(_: StepReport) -> None:
        gc.collect()
        flat = [o for o in gc.get_objects() if type(o) is Tensor and o.shape == (size,)]
        kept.append(len(flat))

    train(adapter, on_step=count)
    assert kept[1:] == [3] * (PLAN.steps - 1)  # weights and two moments


def test_threads_are_given_back(make_adapter: MakeAdapter) -> None:
    before = torch.get_num_threads()
    train(make_adapter(), replace(PLAN, steps=1), performance=Performance(threads=before + 1))
    assert torch.get_num_threads() == before


def observe(adapter: LoraAdapter, records: Sequence[TrainingRecord], direction: Tensor) -> float:
    """Run one step in which everyone takes part and read the noisy sum along a direction.

    With beta1 = beta2 = 0 and a floor far above the second moment, the first update is the noisy
    mean gradient times a constant.
    """
    units = len({record.unit for record in records})
    settings = AdamWSettings(learning_rate=1.0, beta1=0.0, beta2=0.0, floor=1e6, warmup=0.0)
    privacy = GaussianClipping(1e-2, 1.5)
    plan = DPPlan(units, units, 1, privacy, optimizer=settings)
    before = adapter.vector()
    fit(adapter, records, plan)
    after = adapter.vector()
    adapter.load_vector(before)
    # The update is -sum / B / sqrt(1e6 (sigma C / B)^2) = -sum / (1e3 sigma C).
    return float((before - after).double() @ direction) * 1e3 * privacy.noise_multiplier


@pytest.mark.slow
def test_many_runs_do_not_distinguish_better_than_promised(make_adapter: MakeAdapter) -> None:
    """Attack one noisy step with and without a unit, both through the whole engine.

    Along the unit's gradient and in units of the clip norm, the sum is promised to be N(1, 1.5^2)
    with it and N(0, 1.5^2) without. The share of runs above mean + 1.5 is then Phi(-1); its
    Clopper-Pearson bounds at 1 - 1e-6 must enclose that: with too little noise (a broken promise)
    the share is too small, without the unit in the sum as well. False alarm: 4e-6.
    """
    adapter = make_adapter(layers=1, targets=("q_proj",), rank=1)
    others, runs = RECORDS[1:3], 300
    with_unit = [*others, replace(RECORDS[0], unit="x")]
    gradient = selftest.reference(adapter, RECORDS[0]).gradient
    assert gradient.norm() > 0.02  # clipped, so its length in the sum is the clip norm
    direction = (gradient / gradient.norm()).double()
    middle = sum(
        float(g @ direction / max(1.0, float(g.norm()) / 1e-2)) / 1e-2
        for g in (selftest.reference(adapter, record).gradient.double() for record in others)
    )
    for records, mean in ((with_unit, 1.0), (others, 0.0)):
        seen = [observe(adapter, records, direction) - middle for _ in range(runs)]
        hits = sum(value > mean + 1.5 for value in seen)
        low = stats.beta.ppf(1e-6, hits, runs - hits + 1)
        high = stats.beta.ppf(1 - 1e-6, hits + 1, runs - hits)
        assert low <= stats.norm.sf(1) <= high
