"""What is trained and under which guarantee; how fast is a separate matter.

Sampler, noise and the mechanism that the accountant sees all derive from one `DPPlan`; nothing in
`Performance` can alter it (the split follows jax_privacy's execution plan and performance flags).
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from typing import Final

from llmos.errors import InvalidPrivacyParameter
from llmos.privacy import PoissonSampledGaussian

_PLAN_SCHEMA: Final = "llmos.dp-plan/v1"


@dataclass(frozen=True, slots=True)
class GaussianClipping:
    """How much one unit may move a step's sum, and the noise that hides it."""

    clip_norm: float  # L2 bound of one unit's gradient
    noise_multiplier: float  # standard deviation of the noise / clip_norm

    def __post_init__(self) -> None:
        """Refuse a bound that bounds nothing, and noise that hides nothing."""
        for name in ("clip_norm", "noise_multiplier"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InvalidPrivacyParameter(name, value, "a finite number above 0")

    @property
    def noise_std(self) -> float:
        """Return the standard deviation of each coordinate of the noisy sum."""
        return self.clip_norm * self.noise_multiplier


@dataclass(frozen=True, slots=True)
class AdamWSettings:
    """AdamW with linear warm-up and linear decay (Loshchilov and Hutter 2017, arXiv:1711.05101)."""

    learning_rate: float = 2e-3  # its highest value
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.99
    warmup: float = 0.1  # fraction of all steps
    final_rate: float = 0.1  # last learning rate / highest
    floor: float = 1.0  # smallest second moment left by the noise correction / the noise's own

    def __post_init__(self) -> None:
        """Refuse values with which no step makes sense."""
        betas = 0 <= self.beta1 < 1 and 0 <= self.beta2 < 1
        fractions = 0 <= self.warmup <= 1 and 0 <= self.final_rate <= 1
        if not (betas and fractions and self.floor > 0 and self.weight_decay >= 0):
            raise InvalidPrivacyParameter("optimizer", asdict(self), "within the usual ranges")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InvalidPrivacyParameter("learning_rate", self.learning_rate, "above 0")

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of 0-based `step` out of `steps`.

        >>> [round(AdamWSettings(learning_rate=1.0).rate(s, 20), 3) for s in (0, 1, 2, 19)]
        [0.5, 1.0, 0.95, 0.1]
        """
        warm = max(1, round(self.warmup * steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        progress = (step + 1 - warm) / max(1, steps - warm)
        return self.learning_rate * (1 - (1 - self.final_rate) * progress)


@dataclass(frozen=True, slots=True)
class DPPlan:
    """One training run; with `privacy=None` the same loop without clipping, noise and sampling."""

    units: int  # privacy units in the dataset; treated as public
    expected_batch_units: float  # mean units per step; the divisor of the noisy sum
    steps: int
    privacy: GaussianClipping | None
    max_records_per_unit: int = 1  # records of one drawn unit used in a step
    optimizer: AdamWSettings = field(default_factory=AdamWSettings)

    def __post_init__(self) -> None:
        """Refuse plans without data, without steps or with a batch larger than the dataset."""
        for name in ("units", "steps", "max_records_per_unit"):
            if getattr(self, name) < 1:
                raise InvalidPrivacyParameter(name, getattr(self, name), "1 or more")
        if not 0 < self.expected_batch_units <= self.units:
            raise InvalidPrivacyParameter(
                "expected_batch_units",
                self.expected_batch_units,
                f"above 0 and at most the {self.units} units",
            )

    @property
    def sampling_probability(self) -> float:
        """Return the chance with which each unit enters a step."""
        return self.expected_batch_units / self.units

    @property
    def mechanism(self) -> PoissonSampledGaussian | None:
        """Return what the accountant has to charge; None without privacy."""
        if self.privacy is None:
            return None
        return PoissonSampledGaussian(
            sampling_probability=self.sampling_probability,
            noise_multiplier=self.privacy.noise_multiplier,
            steps=self.steps,
        )

    def digest(self) -> str:
        """Return the SHA-256 of the plan: a checkpoint may go on only under the same one."""
        text = json.dumps({"schema": _PLAN_SCHEMA, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Performance:
    """How a step is computed; changes time and memory, never the mechanism."""

    microbatch_tokens: int = 2048  # padded tokens of one forward and backward pass
    threads: int = 0  # CPU threads; 0 leaves PyTorch's setting
    device: str = "cpu"
    prefix_cache_bytes: int = 1 << 30  # for the outputs of frozen blocks below the adapter; 0: off

    def __post_init__(self) -> None:
        """Refuse sizes with which nothing could run."""
        if self.microbatch_tokens < 1 or self.threads < 0 or self.prefix_cache_bytes < 0:
            raise InvalidPrivacyParameter("performance", asdict(self), "made of positive sizes")
