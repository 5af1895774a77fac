"""The plan of a training: everything that is decided before any data is opened."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

from llmos.data.datasets import DatasetCard
from llmos.errors import InvalidPrivacyParameter, ModelExists
from llmos.jobs.jobs import JobState
from llmos.kernel import accounting
from llmos.kernel.pools import Part, PoolState
from llmos.models.registry import check_name
from llmos.privacy import Neighboring, check_delta, check_epsilon
from llmos.workflows import starting_point
from llmos.workflows.calibration import calibrate_noise
from llmos.workflows.parts import Parts
from llmos.workflows.prediction import Prediction, predict_seconds
from llmos.workflows.training_request import Start, TrainRequest

_LARGEST_BATCH: Final = 512
_UNITS_PER_BATCH: Final = 16
_PLAIN_BATCH: Final = 16
_MOST_STEPS: Final = 10**7


class TrainOptions(BaseModel):
    """What a user asks for; what is None gets a default derived from the data."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    model: str
    output: str | None = None
    private: bool = True
    epsilon: float | None = None
    delta: float | None = None
    purpose: str = "training"
    steps: int | None = Field(None, ge=1, le=_MOST_STEPS)
    epochs: float = Field(10.0, gt=0, le=1e6)
    batch: int | None = Field(None, ge=1)
    clip: float = Field(1.0, gt=0, allow_inf_nan=False)
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False)
    rank: int = Field(16, ge=1)
    last_layers: int | None = Field(None, ge=1)
    max_tokens: int = Field(256, ge=8)
    max_records_per_unit: int = Field(4, ge=1)
    microbatch_tokens: int | None = Field(None, ge=64)
    checkpoint_every_s: float = Field(30.0, ge=0, allow_inf_nan=False)
    # Tests only: the certificate then says "not for production".
    seed: int | None = Field(None, ge=0, lt=2**53)


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """A request with what it will cost."""

    request: TrainRequest
    card: DatasetCard
    epsilon: float | None  # PLD, at the request's delta; None without privacy
    epsilon_replace_one: float | None
    epsilon_in_all: float | None  # with what it starts from, where that has learnt the same
    colluding_sites: int | None  # up to which that holds; None where it depends on no other site
    charges: tuple[tuple[PoolState, int], ...]  # each pool with its cost in 1e-12 nats
    predicted: Prediction

    @property
    def steps(self) -> int:
        """Return the number of steps."""
        return self.request.steps

    def lines(self) -> dict[str, str]:
        """Return what a person reads before saying yes."""
        request, card = self.request, self.card
        unit = card.unit_column
        layers = f"the last {request.last_layers} blocks" if request.last_layers else "all blocks"
        lines = {
            "data": f"{card.name} ({card.classification}): {card.records} records of "
            f"{card.units} {unit}s{_erased(card)}; purpose {request.purpose}",
            "model": f"{_start(request)} -> {request.output}, LoRA rank {request.rank} on {layers}",
        }
        if request.noise_multiplier is None:
            return lines | {
                "sampling": f"shuffled batches of {request.batch} {unit}s, {request.steps} steps",
                "guarantee": "NONE: this model may repeat its training data word for word",
                "predicted": str(self.predicted),
            }
        return lines | {
            "sampling": f"Poisson, each {unit} with probability "
            f"{request.plan.sampling_probability:.4f} (about {request.batch} a step), "
            f"{request.steps} steps",
            "clipping": f"L2 norm {request.clip:g} per {unit}; "
            f"noise multiplier {request.noise_multiplier:.4f}",
            "guarantee": f"epsilon {self.epsilon:.3f} at delta {request.delta:g} per {unit} "
            f"(add or remove one; PLD); replace one: {self.epsilon_replace_one:.3f}",
            **self._in_all(),
            "budget": "; ".join(_taken(pool, cost) for pool, cost in self.charges)
            + " (Renyi filter)",
            "predicted": str(self.predicted),
        }

    def _in_all(self) -> dict[str, str]:
        """Say what the new model will have lost in all, where it starts from the same data."""
        start = self.request.start
        if start is None or not start.learnt:
            return {}
        if self.epsilon_in_all is None:
            return {"in all": f"NONE: {start.model} has learnt the same data without privacy"}
        said = (
            f"epsilon {self.epsilon_in_all:.3f} with what {start.model} has learnt of the same "
            "data (Renyi; not for settings that were chosen after seeing it)"
        )
        if self.colluding_sites is not None:
            said += (
                f"; its sites shared their noise: against its coordinator with at most "
                f"{self.colluding_sites} of them, not with more"
            )
        return {"in all": said}

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            **self.request.model_dump(mode="json"),
            "sampling_probability": self.request.plan.sampling_probability,
            "epsilon_pld": self.epsilon,
            "epsilon_replace_one": self.epsilon_replace_one,
            "epsilon_in_all": self.epsilon_in_all,
            "colluding_sites": self.colluding_sites,
            "neighboring": str(Neighboring.ADD_OR_REMOVE_ONE),
            "pools": [
                {
                    "pool": pool.id,
                    "share": cost / pool.cap,
                    "remaining_share": pool.remaining_share,
                }
                for pool, cost in self.charges
            ],
            "predicted_s": self.predicted.seconds,
        }


def _erased(card: DatasetCard) -> str:
    return f", {card.erased_units} of them erased" if card.erased_units else ""


def _start(request: TrainRequest) -> str:
    return request.model if request.start is None else f"{request.start.model} ({request.model})"


def _taken(pool: PoolState, cost: int) -> str:
    share, left = cost / pool.cap, pool.remaining_share
    after = f"{left - share:.1%} afterwards" if share <= left else "NOT ENOUGH: it would be refused"
    return f"takes {share:.1%} of {pool.id}'s; {left:.1%} is left now, {after}"


def make_plan(options: TrainOptions, parts: Parts) -> TrainPlan:
    """Derive the plan from the catalogue alone; neither data nor model is opened.

    Raises:
        InvalidPrivacyParameter: epsilon, delta, clip or batch lie outside their range.
        UnknownDataset, UnknownModel: a name is not known.
        ModelExists: the output's name is taken, or an unfinished job will take it.
        ModelError: a training cannot start from the model, or the output's name is none.
    """
    _check_privacy(options)
    kernel, datasets, registry = parts.kernel, parts.datasets, parts.registry
    card = datasets.card(options.dataset)
    base, start = starting_point.find(options.model, card, registry)
    output = options.output or _default_output(options, card, start)
    _refuse_taken(parts, output)
    part = Part(options.purpose, parts.who.tenant)
    pools = kernel.budget.charged(card.name, part)
    batch = options.batch or _default_batch(card.units_left, private=options.private)
    steps = options.steps or max(1, math.ceil(options.epochs * card.units_left / batch))
    delta = options.delta if options.delta is not None else pools[0].delta
    if batch > card.units_left:
        raise InvalidPrivacyParameter("batch", batch, f"at most the {card.units_left} units")
    noise_multiplier = None
    if options.epsilon is not None and options.private:
        noise_multiplier = calibrate_noise(batch / card.units_left, steps, options.epsilon, delta)
    request = TrainRequest(
        **options.model_dump(
            include={
                "dataset",
                "purpose",
                "clip",
                "learning_rate",
                "rank",
                "last_layers",
                "max_tokens",
                "max_records_per_unit",
                "microbatch_tokens",
                "checkpoint_every_s",
                "seed",
            }
        ),
        model=base.name,
        start=start,
        tenant=part.tenant,
        fingerprint=card.fingerprint,
        output=output,
        epsilon=options.epsilon if options.private else None,
        delta=delta if options.private else None,
        units=card.units_left,
        batch=batch,
        steps=steps,
        noise_multiplier=noise_multiplier,
    )
    mechanism = request.plan.mechanism
    return TrainPlan(
        request=request,
        card=card,
        epsilon=None if mechanism is None else accounting.epsilon(mechanism, delta),
        epsilon_replace_one=None
        if mechanism is None
        else accounting.epsilon(mechanism, delta, Neighboring.REPLACE_ONE),
        epsilon_in_all=None
        if mechanism is None
        else starting_point.epsilon_in_all(request, mechanism, parts),
        colluding_sites=starting_point.colluding_sites(start, registry),
        charges=()
        if mechanism is None
        else tuple((pool, kernel.budget.cost(pool.id, mechanism)) for pool in pools),
        predicted=predict_seconds(request, card, base, parts),
    )


def _check_privacy(options: TrainOptions) -> None:
    if not options.private:
        if options.epsilon is not None:
            raise InvalidPrivacyParameter("epsilon", options.epsilon, "left out without privacy")
        return
    if options.epsilon is None:
        raise InvalidPrivacyParameter("epsilon", None, "given (or say --no-privacy)")
    check_epsilon(options.epsilon)
    if options.delta is not None:
        check_delta(options.delta)


def _default_output(options: TrainOptions, card: DatasetCard, start: Start | None) -> str:
    if start is not None:
        return f"{start.model}-personal"
    return f"{card.name}-{'private' if options.private else 'nonprivate'}"


def _refuse_taken(parts: Parts, name: str) -> None:
    """Refuse a name now that could not be published after hours of training."""
    check_name(name)
    if any(entry.name == name for entry in parts.registry.models()):
        raise ModelExists(f"a model {name!r} exists already", hint="choose another with --output")
    for job in parts.jobs.jobs():
        ended = job.state in (JobState.DONE, JobState.CANCELLED)
        if job.request.get("output") == name and not ended:
            raise ModelExists(
                f"job {job.id} is to make a model {name!r}",
                hint=f"llmos jobs resume {job.id}, or cancel it, or choose another --output",
            )


def _default_batch(units: int, *, private: bool) -> int:
    """Large batches drown the noise; small ones learn faster where there is none."""
    if not private:
        return min(_PLAIN_BATCH, units)
    return max(1, min(_LARGEST_BATCH, max(_PLAIN_BATCH, units // _UNITS_PER_BATCH), units))
