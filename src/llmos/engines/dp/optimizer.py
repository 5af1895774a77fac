"""AdamW whose second moment leaves out the noise that privacy added (DP-AdamBC).

The noisy mean gradient has variance phi = (sigma C / B)^2 more than the clean one in every
coordinate, which would shrink all of Adam's steps; phi is known and is subtracted (Tang et al.
2023, arXiv:2312.14334, algorithm 1). What is left is kept above `floor` x phi, since the difference
of two noisy numbers may come out near zero or negative.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from llmos.engines.dp.plan import AdamWSettings, DPPlan

_SMALLEST_ROOT: Final = 1e-8  # Adam's epsilon


@dataclass(frozen=True, slots=True, eq=False)
class TrainingState:
    """All that a step changes; each tensor is float32 (P,)."""

    step: int  # steps done
    weights: Tensor
    first_moment: Tensor
    second_moment: Tensor

    @classmethod
    def start(cls, weights: Tensor) -> TrainingState:
        """Return the state before the first step."""
        return cls(0, weights, torch.zeros_like(weights), torch.zeros_like(weights))


@dataclass(frozen=True, slots=True, eq=False)
class ProximalTerm:
    """mu / 2 |w - w_global|^2, added to the loss (FedProx: Li et al. 2018, arXiv:1812.06127).

    It depends on no record, so that its gradient is added after clipping and noise.
    """

    mu: float
    centre: Tensor  # (P,) w_global

    def gradient(self, weights: Tensor) -> Tensor:
        """Return mu (w - w_global)."""
        return (weights - self.centre).mul_(self.mu)


def noise_variance(plan: DPPlan) -> float:
    """Return the variance that noise adds to each coordinate of the mean gradient."""
    if plan.privacy is None:
        return 0.0
    return (plan.privacy.noise_std / plan.expected_batch_units) ** 2


def adamw(
    state: TrainingState, gradient: Tensor, settings: AdamWSettings, *, rate: float, variance: float
) -> TrainingState:
    """Return the state after one update.

    Args:
        state: before the update; left as it is.
        gradient: noisy mean gradient (P,).
        settings: moments' decay, weight decay and floor.
        rate: learning rate of this step.
        variance: of the noise in each coordinate of `gradient`; 0 gives plain AdamW.
    """
    step = state.step + 1
    first = torch.lerp(state.first_moment, gradient, 1 - settings.beta1)
    second = (state.second_moment * settings.beta2).addcmul_(
        gradient, gradient, value=1 - settings.beta2
    )
    root = second / (1 - settings.beta2**step)
    root.sub_(variance).clamp_(min=settings.floor * variance).sqrt_().add_(_SMALLEST_ROOT)
    weights = state.weights * (1 - rate * settings.weight_decay)
    weights.addcdiv_(first, root, value=-rate / (1 - settings.beta1**step))
    return TrainingState(step, weights, first, second)
