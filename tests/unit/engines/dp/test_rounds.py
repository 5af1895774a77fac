"""Rounds of one prepared run: what each starts from, what it never uses twice, and FedProx."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.unit.engines.dp.conftest import MakeAdapter, make_records
from torch import Tensor, nn

from llmos.engines.dp import selftest
from llmos.engines.dp.noise import add_gaussian
from llmos.engines.dp.optimizer import TrainingState, adamw, noise_variance
from llmos.engines.dp.plan import AdamWSettings, DPPlan, GaussianClipping
from llmos.engines.dp.randomness import Purpose, Randomness, RandomnessSource
from llmos.engines.dp.rounds import RoundResult, clipped_sum, train_round
from llmos.engines.dp.run import Run, prepare
from llmos.engines.dp.trainer import StepReport, fit
from llmos.errors import EngineError
from llmos.models.lora import Parametrisation

RECORDS = make_records([24, 12, 21, 5, 24, 9, 17, 30], [0, 1, 2, 3, 4, 0, 5, 0])
PRIVACY = GaussianClipping(0.5, 0.8)
PLAN = DPPlan(
    units=6,
    expected_batch_units=3,
    steps=12,
    privacy=PRIVACY,
    max_records_per_unit=2,
    optimizer=AdamWSettings(learning_rate=1e-2),
)
NOISE_ALONE = replace(PLAN, expected_batch_units=1e-9)
SEEDED = Randomness.insecure_test(0)
SIZE = 2 * 7 * 4 * 4  # the cores of rank 4 of two blocks' seven layers


def one(run: Run, weights: Tensor, **options: Any) -> RoundResult:
    """Run steps 5, 6 and 7 of the plan, if nothing else is asked for."""
    usual: dict[str, Any] = {"first_step": 4, "steps": 3, "randomness": SEEDED}
    return train_round(run, weights, **(usual | options))


def noise(step: int) -> Tensor:
    """Return the mean gradient of a step in which nobody was drawn."""
    total = torch.zeros(SIZE)
    add_gaussian(total, PRIVACY.noise_std, SEEDED.stream(Purpose.NOISE, step))
    return total.div_(NOISE_ALONE.expected_batch_units)


def sb(make_adapter: MakeAdapter, plan: DPPlan = PLAN, **config: Any) -> tuple[Run, Tensor]:
    adapter = make_adapter(parametrisation=Parametrisation.SB, **config)
    return prepare(adapter, RECORDS, plan), adapter.vector()


@pytest.mark.parametrize("kind", Parametrisation)
def test_a_round_over_the_whole_plan_is_fit(
    make_adapter: MakeAdapter, kind: Parametrisation
) -> None:
    plan = replace(PLAN, steps=3)
    adapter = make_adapter(parametrisation=kind, last_layers=1)
    weights = adapter.vector()
    reports: list[StepReport] = []
    result = one(
        prepare(adapter, RECORDS, plan), weights, first_step=0, steps=3, on_step=reports.append
    )
    assert torch.equal(adapter.vector(), result.weights)
    adapter.load_vector(weights)
    theirs = fit(adapter, RECORDS, plan, randomness=SEEDED)
    assert torch.equal(adapter.vector(), result.weights)
    assert (result.mechanism_run, result.steps, result.tokens, result.self_tested) == (
        theirs.mechanism_run,
        theirs.steps,
        theirs.tokens,
        theirs.self_tested,
    )
    losses = [report.mean_loss for report in reports if report.mean_loss is not None]
    assert result.mean_loss == pytest.approx(sum(losses) / len(losses))
    assert result.randomness is RandomnessSource.INSECURE_TEST


@pytest.mark.parametrize("proximal", [0.0, 2e9])
def test_a_round_has_the_plan_s_rates_its_own_moments_and_a_pull_without_bound(
    make_adapter: MakeAdapter, proximal: float
) -> None:
    """With nobody drawn all is known; mu is huge because the noise is divided by 1e-9 units."""
    run, weights = sb(make_adapter, NOISE_ALONE)
    reports: list[StepReport] = []
    result = one(run, weights, proximal=proximal, on_step=reports.append)
    state = TrainingState.start(weights)
    for step in (4, 5, 6):
        state = adamw(
            state,
            noise(step) + proximal * (state.weights - weights),
            NOISE_ALONE.optimizer,
            rate=NOISE_ALONE.optimizer.rate(step, 12),
            variance=noise_variance(NOISE_ALONE),
        )
    torch.testing.assert_close(result.weights, state.weights, rtol=1e-5, atol=1e-7)
    assert [(report.step, report.steps) for report in reports] == [(5, 12), (6, 12), (7, 12)]
    assert (result.steps, result.tokens, result.mean_loss) == (3, 0, None)
    assert not result.self_tested


def test_the_pull_keeps_the_weights_nearer(make_adapter: MakeAdapter) -> None:
    run, weights = sb(make_adapter, replace(PLAN, privacy=None))
    free, pulled = (
        (one(run, weights, steps=8, proximal=mu).weights - weights).norm() for mu in (0.0, 30.0)
    )
    assert pulled < 0.8 * free


def test_a_seeded_round_repeats_whatever_ran_before(make_adapter: MakeAdapter) -> None:
    run, weights = sb(make_adapter)
    first = one(run, weights).weights
    one(run, first, first_step=7)
    assert torch.equal(one(run, weights).weights, first)


def test_a_repeated_round_never_uses_noise_twice(make_adapter: MakeAdapter) -> None:
    run, weights = sb(make_adapter, NOISE_ALONE)
    results = [one(run, weights, randomness=None) for _ in range(2)]
    assert not torch.equal(results[0].weights, results[1].weights)
    assert results[0].randomness is RandomnessSource.OPERATING_SYSTEM


def test_what_is_prepared_and_tested_once_is_not_done_again(
    make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests: list[int] = []
    compare = selftest.compare

    def counted(*arguments: Any) -> None:
        tests.append(1)
        compare(*arguments)

    monkeypatch.setattr(selftest, "compare", counted)
    run, weights = sb(make_adapter, layers=3, last_layers=1)
    assert run.cache is not None
    passes: list[int] = []
    blocks = run.adapter.model.get_submodule(run.adapter.blocks)
    assert isinstance(blocks, nn.ModuleList)
    blocks[0].register_forward_hook(lambda *_: passes.append(1))
    first = one(run, weights)
    assert first.self_tested
    assert (len(tests), len(passes)) == (1, 2)  # two records by ordinary autograd
    second = one(run, first.weights, first_step=7, self_tested=first.self_tested)
    assert second.self_tested
    assert (len(tests), len(passes)) == (1, 2)


def test_stop_ends_a_round_early(make_adapter: MakeAdapter) -> None:
    run, weights = sb(make_adapter)
    reports: list[StepReport] = []
    result = one(run, weights, on_step=reports.append, stop=lambda: len(reports) == 2)
    assert result.steps == len(reports) == 2
    assert PLAN.mechanism is not None
    assert result.mechanism_run == PLAN.mechanism.after(2)
    assert torch.equal(result.weights, one(run, weights, steps=2).weights)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"first_step": -1},
        {"first_step": 10},
        {"proximal": -1.0},
        {"proximal": float("nan")},
    ],
)
def test_a_round_outside_the_plan_is_refused(
    make_adapter: MakeAdapter, options: dict[str, Any]
) -> None:
    run, weights = sb(make_adapter)
    with pytest.raises(EngineError, match=r"within the plan|finite mu"):
        one(run, weights, **options)


def test_weights_of_another_adapter_or_no_numbers_are_refused(make_adapter: MakeAdapter) -> None:
    run, weights = sb(make_adapter)
    for other in (weights[1:], weights.double(), weights[None]):
        with pytest.raises(EngineError, match="another shape"):
            one(run, other)
    with pytest.raises(EngineError, match="not finite"):
        one(run, weights / 0)
    assert torch.equal(run.adapter.vector(), weights)


def test_data_beyond_the_plan_are_refused_when_preparing(make_adapter: MakeAdapter) -> None:
    with pytest.raises(EngineError, match="the data has 6"):
        prepare(make_adapter(), RECORDS, replace(PLAN, units=5))


def test_divergence_is_an_error_from_the_first_step_of_a_later_round(
    make_adapter: MakeAdapter,
) -> None:
    run, weights = sb(make_adapter, replace(PLAN, privacy=None))
    with pytest.raises(EngineError, match="diverged at step 5"):
        one(run, torch.full_like(weights, 1e30), self_tested=True)


def test_a_clipped_sum_is_what_a_step_adds_its_noise_to(make_adapter: MakeAdapter) -> None:
    run, start = sb(make_adapter)
    found = clipped_sum(run, start, step=4, randomness=SEEDED)
    assert found.self_tested
    noisy = found.total.clone()
    add_gaussian(noisy, PRIVACY.noise_std, SEEDED.stream(Purpose.NOISE, 4))
    expected = adamw(
        TrainingState.start(start),
        noisy.div_(PLAN.expected_batch_units),
        PLAN.optimizer,
        rate=PLAN.optimizer.rate(4, PLAN.steps),
        variance=noise_variance(PLAN),
    )
    stepped = one(run, start, steps=1)
    assert torch.equal(stepped.weights, expected.weights)


def test_a_unit_adds_no_more_than_the_clip(make_adapter: MakeAdapter) -> None:
    everybody = replace(PLAN, expected_batch_units=6)
    without = replace(PLAN, units=5, expected_batch_units=5)
    run, start = sb(make_adapter, everybody)
    rest = [record for record in RECORDS if record.unit != 3]
    smaller = prepare(run.adapter, rest, without)
    apart = clipped_sum(run, start, step=0, randomness=SEEDED).total
    apart = apart - clipped_sum(smaller, start, step=0, randomness=SEEDED).total
    assert 0.1 * PRIVACY.clip_norm < apart.norm() <= PRIVACY.clip_norm * (1 + 1e-5)


def test_a_sum_without_clipping_is_refused(make_adapter: MakeAdapter) -> None:
    run, start = sb(make_adapter, replace(PLAN, privacy=None))
    with pytest.raises(EngineError, match="without clipping"):
        clipped_sum(run, start, step=0)
    run, start = sb(make_adapter)
    for wrong in (12, -1):
        with pytest.raises(EngineError, match="not within the plan"):
            clipped_sum(run, start, step=wrong)
