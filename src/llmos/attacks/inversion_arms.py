"""All arms of the gradient inversion test, on single records of one site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmos.attacks import observations
from llmos.attacks.inversion import (
    DRAWS,
    Guess,
    InversionArm,
    InversionReport,
    Observation,
    Sample,
    Values,
    guess,
    span_distances,
    summarise,
)
from llmos.attacks.observations import Residues, Sending
from llmos.attacks.scoring import EncodedRecord
from llmos.attacks.subject import MeasuredModel
from llmos.attacks.vocabulary import TokenLayer, in_float32, token_layers, token_vectors
from llmos.engines.dp.plan import Performance
from llmos.engines.dp.sampling import TrainingRecord
from llmos.engines.federated import fixed_point
from llmos.errors import MeasurementError
from llmos.models.lora import LoraAdapter


@dataclass(slots=True)
class _Attack:
    """The coordinator's side: what it knows, and the guesses it has made so far."""

    layers: tuple[TokenLayer, ...]
    vectors: tuple[Values, ...]
    modulus_bits: int
    guesses: dict[Observation, list[Guess]] = field(default_factory=dict)
    noise: dict[Observation, list[list[int]]] = field(default_factory=dict)
    generator: np.random.Generator = field(default_factory=np.random.default_rng)

    def __call__(
        self, observation: Observation, update: NDArray[np.floating], record: TrainingRecord
    ) -> None:
        """Guess the tokens of a record from an update (P,); the truth only counts the hits."""
        tokens = sorted(observations.inputs(record.ids))
        matrices = [layer.matrix(update) for layer in self.layers]
        self.guesses.setdefault(observation, []).append(self._guess(observation, matrices, tokens))
        draws = [self._guess(observation, self._noise(matrices), tokens) for _ in range(DRAWS)]
        self.noise.setdefault(observation, []).append([one.hits for one in draws])

    def _guess(
        self, observation: Observation, matrices: Sequence[Values], tokens: Sequence[int]
    ) -> Guess:
        distances = span_distances(observation, matrices, self.vectors, len(tokens))
        return guess(distances, tokens)

    def _noise(self, like: Sequence[Values]) -> list[Values]:
        """Draw what a mask makes of anything: integers, uniform mod 2^k, centred."""
        half = 1 << self.modulus_bits - 1
        return [self.generator.integers(-half, half, one.shape).astype(np.float64) for one in like]

    def summaries(self) -> dict[Observation, InversionArm]:
        """Sum up each arm."""
        return {
            kind: summarise(kind, made, self.noise[kind]) for kind, made in self.guesses.items()
        }


def measure(
    subject: MeasuredModel,
    adapter: LoraAdapter,
    records: Sequence[EncodedRecord],
    sending: Sending,
    *,
    aggregation: Literal["masked", "plain"],
    performance: Performance | None = None,
) -> InversionReport:
    """Attack each record's first step from the adapter's present weights, and put those back.

    Records are cut to fewer distinct tokens than the rank, for only there can the attack succeed:
    a longer one escapes this attack even in the clear.

    Args:
        subject: what is measured.
        adapter: with frozen A, on its base model.
        records: as the job encodes them; some may be too short to be of use.
        sending: how the job's sites make their messages.
        aggregation: of the job: decides what its coordinator sees, and whether there are masks.
        performance: how to compute.

    Raises:
        MeasurementError: the attack does not apply to this adapter, or no record can be used.
        SelfTestFailed: the engine found that it would not train correctly.
    """
    layers = token_layers(adapter)
    cut_to = adapter.config.rank - 1
    cut = [observations.shorten(record, cut_to) for record in records]
    chosen = [record for record in cut if record is not None]
    if not chosen:
        raise MeasurementError(
            f"no record leaves two tokens to find at rank {adapter.config.rank}",
            hint="the test needs a rank of 3 or more and records of three tokens or more",
        )
    start = adapter.vector()
    try:
        trained = _trained_arms(adapter, layers, chosen, start, sending, performance)
        with in_float32(adapter.model):
            exact, seen = _gradient_arms(adapter, layers, chosen, start, sending)
    finally:
        adapter.load_vector(start)
    arms = exact.summaries() | trained.summaries()
    return InversionReport(
        subject=subject,
        sample=Sample(offered=len(records), used=len(chosen), cut_to=cut_to),
        parametrisation=str(adapter.config.parametrisation),
        rank=adapter.config.rank,
        layers=tuple(layer.name for layer in layers),
        vocabulary=len(exact.vectors[0]),
        aggregation=aggregation,
        noise_multiplier=None if sending.privacy is None else sending.privacy.noise_multiplier,
        clip_norm=None if sending.privacy is None else sending.privacy.clip_norm,
        arms=tuple(arms[kind] for kind in Observation if kind in arms),
        uniformity=observations.uniformity(seen, sending.modulus_bits),
    )


def _trained_arms(
    adapter: LoraAdapter,
    layers: tuple[TokenLayer, ...],
    records: Sequence[TrainingRecord],
    start: Tensor,
    sending: Sending,
    performance: Performance | None,
) -> _Attack:
    """Attack what the engine's own step makes of a record, in the model's own dtype."""
    attack = _Attack(layers, token_vectors(adapter, layers), sending.modulus_bits)
    speed = performance or Performance()
    for record in records:
        update = observations.stepped(adapter, record, start, sending, speed, private=False)
        attack(Observation.SENT, observations.sent(update, sending.bits), record)
        if sending.privacy is not None:
            noisy = observations.stepped(adapter, record, start, sending, speed, private=True)
            attack(Observation.PRIVATE, noisy, record)
    return attack


def _gradient_arms(
    adapter: LoraAdapter,
    layers: tuple[TokenLayer, ...],
    records: Sequence[TrainingRecord],
    start: Tensor,
    sending: Sending,
) -> tuple[_Attack, list[Residues]]:
    """Attack the gradient itself, as numbers, as integers, and behind the mask."""
    attack = _Attack(layers, token_vectors(adapter, layers), sending.modulus_bits)
    seen = []
    for record in records:
        gradient = observations.gradient(adapter, record, start)
        attack(Observation.GRADIENT, gradient, record)
        limit = max(float(np.abs(layer.matrix(gradient)).max()) for layer in layers)
        plain, fixed = observations.residues(gradient, limit, sending.mask_bits)
        attack(Observation.UNMASKED, fixed_point.from_residues(plain, fixed), record)
        hidden = observations.masked(plain, fixed)
        attack(Observation.MASKED, fixed_point.from_residues(hidden, fixed), record)
        seen.append(hidden)
    return attack, seen
