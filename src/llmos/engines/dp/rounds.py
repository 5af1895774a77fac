"""A site's part in federated training: a few steps from the weights that all sites share.

The coordinator averages what the sites' rounds return (McMahan et al. 2016, arXiv:1602.05629).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from llmos.engines.dp.optimizer import ProximalTerm, TrainingState
from llmos.engines.dp.randomness import Randomness, RandomnessSource
from llmos.engines.dp.run import Run, threads
from llmos.engines.dp.trainer import StepReport, Stretch, advance, gradient_sum, self_test
from llmos.errors import EngineError
from llmos.privacy import Mechanism


@dataclass(frozen=True, slots=True, eq=False)
class RoundResult:
    """What one round has run; the adapter holds its weights too.

    Tokens and loss come from private data without noise, as in `StepReport`.
    """

    weights: Tensor  # (P,) after the round
    mechanism_run: Mechanism | None  # of this round alone; None without privacy
    steps: int  # really done: fewer than asked for only if `stop` ended the round
    mean_loss: float | None  # over the steps that had a record; None if none had
    tokens: int
    randomness: RandomnessSource
    self_tested: bool  # in this round or before; give it to the next one


def train_round(
    run: Run,
    weights: Tensor,
    *,
    first_step: int,
    steps: int,
    randomness: Randomness | None = None,
    proximal: float = 0.0,
    self_tested: bool = False,
    on_step: Callable[[StepReport], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> RoundResult:
    """Train from `weights` with fresh moments; rates and batches are the plan's from `first_step`.

    Args:
        run: from `prepare`; any number of rounds may follow.
        weights: (P,) that all sites start from.
        first_step: 0-based step of the plan with which the round begins.
        steps: how many to run.
        randomness: default: a fresh key. A round that is repeated takes a fresh one too: two
            results under the same noise would give it away.
        proximal: mu of FedProx; 0 turns it off.
        self_tested: what the last round of this run returned; False tests the engine first.
        on_step: receives a report after every step.
        stop: asked after every step but the last; True ends the round there.

    Raises:
        SelfTestFailed: the engine found on the first batch that it would not train correctly.
        EngineError: weights, steps or mu do not fit the run; or training diverged.
    """
    _check(run, weights, first_step, steps, proximal)
    start = weights.to(run.performance.device)
    stretch = Stretch(
        randomness or Randomness.fresh(),
        first_step,
        ProximalTerm(proximal, start) if proximal else None,
    )
    state, tokens, losses = TrainingState.start(start), 0, []
    with threads(run.performance.threads):
        run.adapter.load_vector(start)
        for done in advance(run, stretch, state, steps, self_tested=self_tested):
            state, self_tested = done.state, done.self_tested
            tokens += done.report.tokens
            if done.report.mean_loss is not None:
                losses.append(done.report.mean_loss)
            if on_step is not None:
                on_step(done.report)
            if stop is not None and state.step < steps and stop():
                break
    return RoundResult(
        weights=state.weights,
        mechanism_run=None if run.plan.mechanism is None else run.plan.mechanism.after(state.step),
        steps=state.step,
        mean_loss=sum(losses) / len(losses) if losses else None,
        tokens=tokens,
        randomness=stretch.randomness.source,
        self_tested=self_tested,
    )


@dataclass(frozen=True, slots=True, eq=False)
class ClippedSum:
    """The clipped gradients of one step's batch, added up: private data until noise is added."""

    total: Tensor  # (P,)
    randomness: Randomness  # of sampling; the noise of this step comes from its other stream
    self_tested: bool  # in this round or before; give it to the next one


def clipped_sum(
    run: Run,
    weights: Tensor,
    *,
    step: int,
    randomness: Randomness | None = None,
    self_tested: bool = False,
) -> ClippedSum:
    """Sample one step's batch at `weights` and add up its clipped gradients, without noise.

    Args:
        run: from `prepare`, under a plan with privacy.
        weights: (P,) that all sites start from.
        step: 0-based step of the plan.
        randomness: default: a fresh key.
        self_tested: what the last round of this run returned; False tests the engine first.

    Raises:
        SelfTestFailed: the engine found on the batch that it would not train correctly.
        EngineError: weights or step do not fit the run, or it has no privacy.
    """
    if run.plan.privacy is None:
        raise EngineError("a sum without clipping has no bound that noise could hide")
    _check(run, weights, step, 1, 0.0)
    randomness = randomness or Randomness.fresh()
    draws = run.sampler.batch(step, randomness)
    start = weights.to(run.performance.device)
    with threads(run.performance.threads):
        run.adapter.load_vector(start)
        self_tested = self_tested or self_test(run, draws)
        with run.fusion.active():
            total, _, _ = gradient_sum(run, draws, start)
    return ClippedSum(total, randomness, self_tested)


def _check(run: Run, weights: Tensor, first_step: int, steps: int, proximal: float) -> None:
    """Refuse what no coordinator that follows the plan asks for."""
    if not 0 <= first_step < first_step + steps <= run.plan.steps:
        raise EngineError(
            f"a round of {steps} steps from step {first_step} is not within the plan's "
            f"{run.plan.steps}"
        )
    if not (math.isfinite(proximal) and proximal >= 0):
        raise EngineError(f"FedProx needs a finite mu of 0 or more, not {proximal}")
    own = run.adapter.vector()
    if weights.shape != own.shape or weights.dtype != own.dtype:
        raise EngineError("the round's weights belong to an adapter of another shape")
    if not bool(weights.isfinite().all()):
        raise EngineError("the round's weights are not finite numbers")
