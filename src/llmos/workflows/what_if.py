"""What a training would cost each pool it is charged to, without reserving anything."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from llmos.errors import InvalidPrivacyParameter
from llmos.kernel import accounting
from llmos.kernel.pools import Part
from llmos.privacy import PoissonSampledGaussian, check_delta, check_epsilon
from llmos.workflows.budget_advice import feasible
from llmos.workflows.calibration import calibrate_noise
from llmos.workflows.parts import Parts


@dataclass(frozen=True, slots=True)
class PoolCost:
    """What one pool would pay; shares are of its cap."""

    pool: str
    share: float
    remaining_share: float  # before
    admitted: bool
    jobs_that_fit: int  # of this kind, now
    would_fit: dict[str, float]  # the same job with one of epsilon, steps or noise changed


@dataclass(frozen=True, slots=True)
class WhatIf:
    """A job that was priced."""

    mechanism: PoissonSampledGaussian
    epsilon: float  # of this job alone, by PLD accounting
    delta: float
    pools: tuple[PoolCost, ...]

    @property
    def admitted(self) -> bool:
        """Tell whether every pool could pay now."""
        return all(pool.admitted for pool in self.pools)

    def to_dict(self) -> dict[str, Any]:
        """Return the prices as JSON values."""
        return {**asdict(self), "admitted": self.admitted}


def run(
    dataset: str,
    parts: Parts,
    *,
    purpose: str,
    batch: int,
    steps: int,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    delta: float | None = None,
) -> WhatIf:
    """Price a training by its epsilon or by its noise multiplier, whichever is given.

    It is priced for the tenant of whoever asks.

    Raises:
        UnknownDataset: there is none of this name.
        InvalidPrivacyParameter: both or neither is given, or a number is out of range.
    """
    card, budget = parts.datasets.card(dataset), parts.kernel.budget
    pools = budget.charged(dataset, Part(purpose, parts.who.tenant))
    delta = pools[0].delta if delta is None else check_delta(delta)
    if not 1 <= batch <= card.units_left:
        raise InvalidPrivacyParameter("batch", batch, f"from 1 to the {card.units_left} units")
    if steps < 1:
        raise InvalidPrivacyParameter("steps", steps, "1 or more")
    rate = batch / card.units_left
    match epsilon, noise_multiplier:
        case float(), None:
            noise = calibrate_noise(rate, steps, check_epsilon(epsilon), delta)
        case None, float():
            noise = noise_multiplier
        case _:
            raise InvalidPrivacyParameter("epsilon", epsilon, "given, or a noise multiplier")
    mechanism = PoissonSampledGaussian(rate, noise, steps)
    return WhatIf(
        mechanism=mechanism,
        epsilon=accounting.epsilon(mechanism, delta),
        delta=delta,
        pools=tuple(
            PoolCost(
                pool=pool.id,
                share=cost / pool.cap,
                remaining_share=pool.remaining_share,
                admitted=cost <= pool.remaining,
                jobs_that_fit=pool.remaining // cost,
                would_fit=feasible(mechanism, pool.renyi_order, pool.delta, pool.remaining),
            )
            for pool in pools
            for cost in (budget.cost(pool.id, mechanism),)
        ),
    )
