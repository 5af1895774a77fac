"""Fine-tuning under a plan: one step on one screen, and the loop around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmos.engines.dp import checkpoint, selftest
from llmos.engines.dp.clipping import RecordedProduct, Recorder, SummedGradients, UnitGradients
from llmos.engines.dp.loss import Batch, collate, losses
from llmos.engines.dp.noise import add_gaussian
from llmos.engines.dp.optimizer import ProximalTerm, TrainingState, adamw, noise_variance
from llmos.engines.dp.plan import DPPlan, Performance
from llmos.engines.dp.randomness import Purpose, Randomness, RandomnessSource
from llmos.engines.dp.run import Run, prepare, threads
from llmos.engines.dp.sampling import Draw, Microbatch, TrainingRecord, microbatches
from llmos.errors import EngineError
from llmos.models.lora import LoraAdapter
from llmos.privacy import Mechanism


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step saw.

    Tokens and loss come from private data without noise and are no part of what the mechanism
    releases: the caller decides who may read them.
    """

    step: int  # steps done, this one included
    steps: int  # steps planned
    seconds: float
    tokens: int  # through the model, padding included
    mean_loss: float | None  # nats a token, over the step's records; None for an empty batch


@dataclass(frozen=True, slots=True)
class FitResult:
    """What has been run when `fit` returns; the adapter holds the trained weights."""

    mechanism_run: Mechanism | None  # with the steps really done; None without privacy
    steps: int  # done in all, earlier runs included
    finished: bool  # False if `stop` ended it
    seconds: float  # of this call
    tokens: int  # of this call
    randomness: RandomnessSource
    self_tested: bool  # False only if no step so far had a record


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """Steps in a row under one random key and from fresh moments; `fit` is one over the plan."""

    randomness: Randomness
    first_step: int = 0  # of the plan: where its learning rates and batches go on
    proximal: ProximalTerm | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Progress:
    """Where a stretch stands after a step; the state counts the stretch's own steps."""

    state: TrainingState
    report: StepReport
    self_tested: bool  # False while no step had a record


def step(run: Run, stretch: Stretch, state: TrainingState) -> tuple[TrainingState, StepReport]:
    """Sample, clip, sum, add noise, update. An empty batch is a step of noise alone."""
    started = time.perf_counter()
    plan, number = run.plan, stretch.first_step + state.step
    draws = run.sampler.batch(number, stretch.randomness)
    total, tokens, mean_loss = gradient_sum(run, draws, state.weights)
    if plan.privacy is not None:
        stream = stretch.randomness.stream(Purpose.NOISE, number)
        add_gaussian(total, plan.privacy.noise_std, stream)
    divisor = len(draws) if plan.privacy is None else plan.expected_batch_units
    total.div_(divisor)
    if stretch.proximal is not None:
        total.add_(stretch.proximal.gradient(state.weights))
    after = adamw(
        state,
        total,
        plan.optimizer,
        rate=plan.optimizer.rate(number, plan.steps),
        variance=noise_variance(plan),
    )
    run.adapter.load_vector(after.weights)
    seconds = time.perf_counter() - started
    return after, StepReport(number + 1, plan.steps, seconds, tokens, mean_loss)


def gradient_sum(
    run: Run, draws: Sequence[Draw], weights: Tensor
) -> tuple[Tensor, int, float | None]:
    """Return a batch's sum of gradients (P,), clipped under privacy; its tokens and mean loss.

    There is no noise in any of them: the caller adds it before anybody sees the sum.
    """
    total = torch.zeros_like(weights)
    tokens, record_losses = 0, []
    for microbatch in microbatches(draws, run.lengths, run.performance.microbatch_tokens):
        batch = collate(run.records, microbatch, run.performance.device)
        record_losses.append(_add_gradient(run, microbatch, batch, total))
        tokens += batch.tokens
    return total, tokens, torch.cat(record_losses).mean().item() if record_losses else None


def advance(
    run: Run, stretch: Stretch, state: TrainingState, steps: int, *, self_tested: bool = False
) -> Iterator[Progress]:
    """Go on until `steps` of the stretch are done; check the engine once and every update.

    Raises:
        SelfTestFailed: the engine found on the first batch that it would not train correctly.
        EngineError: training diverged.
    """
    unmoved = not self_tested
    while state.step < steps:
        if not self_tested:
            draws = run.sampler.batch(stretch.first_step + state.step, stretch.randomness)
            self_tested = self_test(run, draws)
        first = state.weights if unmoved else None
        with run.fusion.active():
            state, report = step(run, stretch, state)
        _check(first, state, report)
        unmoved = unmoved and report.tokens == 0
        yield Progress(state, report, self_tested)


def fit(
    adapter: LoraAdapter,
    records: Sequence[TrainingRecord],
    plan: DPPlan,
    performance: Performance | None = None,
    *,
    randomness: Randomness | None = None,
    resume: bytes | None = None,
    save: Callable[[bytes, int], None] | None = None,
    save_every_s: float = 60.0,
    on_step: Callable[[StepReport], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> FitResult:
    """Train the adapter in place.

    Args:
        adapter: from `llmos.models.lora.attach`, on the model to train.
        records: encoded records; those of one unit are protected together.
        plan: what to run; decides the mechanism alone.
        performance: how to compute it.
        randomness: default: a fresh key. A resumed run takes a fresh one too.
        resume: a checkpoint that `save` received under the same plan.
        save: receives a checkpoint and the steps it covers, about every `save_every_s` seconds, at
            a stop and at the end, before the next step is drawn.
        save_every_s: seconds between checkpoints.
        on_step: receives a report after every step.
        stop: asked before every step; True ends the run there.

    Raises:
        SelfTestFailed: the engine found on the first batch that it would not train correctly.
        EngineError: plan and records, or plan and checkpoint, do not fit; or training diverged.
    """
    randomness = randomness or Randomness.fresh()
    began = saved = time.perf_counter()
    run = prepare(adapter, records, plan, performance)
    with threads(run.performance.threads):
        state, tested = _start(run, resume)
        tokens, stopped = 0, False
        for done in advance(run, Stretch(randomness), state, plan.steps):
            state, tested = done.state, tested or done.self_tested
            tokens += done.report.tokens
            if on_step is not None:
                on_step(done.report)
            stopped = stop is not None and state.step < plan.steps and stop()
            due = time.perf_counter() - saved >= save_every_s
            if save is not None and (due or stopped or state.step == plan.steps):
                save(checkpoint.encode(state, plan, self_tested=tested), state.step)
                saved = time.perf_counter()
            if stopped:
                break
    return FitResult(
        mechanism_run=None if plan.mechanism is None else plan.mechanism.after(state.step),
        steps=state.step,
        finished=not stopped,
        seconds=time.perf_counter() - began,
        tokens=tokens,
        randomness=randomness.source,
        self_tested=tested,
    )


def _start(run: Run, resume: bytes | None) -> tuple[TrainingState, bool]:
    """Return the state to go on from, and whether its run had been self-tested."""
    weights = run.adapter.vector()
    if resume is None:
        return TrainingState.start(weights), False
    saved = checkpoint.decode(
        resume, run.plan, parameters=weights.numel(), device=run.performance.device
    )
    run.adapter.load_vector(saved.state.weights)
    return saved.state, saved.self_tested


def _add_gradient(run: Run, microbatch: Microbatch, batch: Batch, total: Tensor) -> Tensor:
    """Add a microbatch's (clipped) gradient sum to `total` (P,); return record losses (R,)."""
    if run.plan.privacy is None:
        recorder = SummedGradients(run.adapter, total)
        per_record = _record(run, microbatch, batch, recorder)
        recorder.check()
        return per_record
    units = UnitGradients(run.adapter, batch.unit_of_row, batch.units)
    per_record = _record(run, microbatch, batch, units)
    units.add_clipped(total, run.plan.privacy.clip_norm)
    return per_record


def _record(run: Run, microbatch: Microbatch, batch: Batch, recorder: Recorder) -> Tensor:
    """Run forward and backward once; the gradients go to `recorder`."""
    with run.adapter.using(RecordedProduct(recorder, run.scratch)):
        if run.cache is None:
            hidden = run.model.body(input_ids=batch.ids, use_cache=False).last_hidden_state
        else:
            hidden = run.cache.body(run.model.body, microbatch.records)
        objective, per_record = losses(run.model, batch, hidden)
        objective.backward()  # type: ignore[no-untyped-call]
    return per_record


def self_test(run: Run, draws: Sequence[Draw]) -> bool:
    """Check two records of a batch against ordinary autograd; False if the batch is empty."""
    chosen = tuple(draw.records[0] for draw in draws[:2])
    if not chosen:
        return False
    microbatch = Microbatch(chosen, tuple(range(len(chosen))), len(chosen))
    batch = collate(run.records, microbatch, run.performance.device)
    weights = run.adapter.vector()
    run.adapter.load_vector(selftest.trial_weights(run.adapter))
    try:
        units = UnitGradients(run.adapter, batch.unit_of_row, batch.units)
        with run.fusion.active():
            per_record = _record(run, microbatch, batch, units)
        checked = [run.records[record] for record in chosen]
        selftest.compare(run.adapter, units.matrix(), per_record, checked)
    finally:
        run.adapter.load_vector(weights)
    return True


def _check(first: Tensor | None, state: TrainingState, report: StepReport) -> None:
    """Check the first update closely and every later one for divergence."""
    if first is not None:
        selftest.check_update(first, state.weights)
    elif not bool(state.weights.isfinite().all()):
        raise EngineError(
            f"training diverged at step {report.step}: a weight is not a finite number",
            hint="lower the learning rate",
        )
