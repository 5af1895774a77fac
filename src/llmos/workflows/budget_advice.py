"""What a budget's numbers mean, and what would still fit into it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from llmos.data.datasets import DatasetCard
from llmos.errors import BudgetExceeded
from llmos.kernel import accounting, pricing
from llmos.kernel.budget import Budget
from llmos.kernel.pools import PoolState
from llmos.privacy import Mechanism
from llmos.reports.theorems import THEOREMS
from llmos.workflows import calibration


@lru_cache(maxsize=256)
def feasible(mechanism: Mechanism, order: float, delta: float, available: int) -> dict[str, float]:
    """Return what would fit into `available`, changing one of noise, steps and epsilon."""
    steps = available // pricing.cost(mechanism.after(1), order)
    noise = calibration.least_noise(
        lambda noise: pricing.cost(replace(mechanism, noise_multiplier=noise), order) <= available,
        start=mechanism.noise_multiplier,
    )
    if math.isinf(noise):
        return {"epsilon": 0.0, "steps": float(steps)}
    noise = calibration.round_up(noise)
    epsilon = accounting.epsilon(replace(mechanism, noise_multiplier=noise), delta)
    return {
        "epsilon": calibration.round_down(epsilon),
        "steps": float(steps),
        "noise_multiplier": noise,
    }


def with_advice(refused: BudgetExceeded, mechanism: Mechanism, budget: Budget) -> BudgetExceeded:
    """Return a refusal that also says what the pool could still pay for."""
    pool = budget.pool(refused.pool)
    fitting = feasible(mechanism, pool.renyi_order, pool.delta, pool.remaining)
    advice = hint(fitting, pool.delta)
    return BudgetExceeded(pool.id, refused.message, hint=advice, feasible=fitting)


def hint(fitting: Mapping[str, float], delta: float) -> str:
    """Say in words what `feasible` found at the pool's delta."""
    if "noise_multiplier" not in fitting:
        return "nothing of this kind fits any more; the budget of these people is used up"
    return (
        f"this would fit: epsilon {fitting['epsilon']:g} at delta {delta:g}, or a noise "
        f"multiplier of {fitting['noise_multiplier']:g}, or {fitting['steps']:.0f} steps"
    )


def explain(
    pool: PoolState, holders: Sequence[str], family: Sequence[DatasetCard] = ()
) -> dict[str, Any]:
    """Return a pool's numbers as JSON values, with the theorems that stand behind them.

    Args:
        pool: what is explained.
        holders: the jobs that hold parts of it.
        family: the datasets, among which are its own and the blocks of that one.
    """
    theorems = THEOREMS
    own = next((card.block for card in family if card.name == pool.dataset), None)
    blocks = [c.name for c in family if c.block is not None and c.block.of == pool.dataset]
    disjoint: dict[str, Any] = {"blocks": blocks, "block_of": None if own is None else own.of}
    if own is not None or blocks:
        disjoint["blocks_do_not_add_up"] = theorems["parallel"]
    return {
        "pool": pool.id,
        "dataset": pool.dataset,
        "purpose": pool.purpose,
        "tenant": pool.tenant,
        "unit": pool.total.unit.column,
        "neighboring": str(pool.total.neighboring),
        "epsilon": pool.epsilon,
        "delta": pool.delta,
        "renyi_order": pool.renyi_order,
        "cap_nats": pool.cap / pricing.UNITS_PER_NAT,
        "spent_share": pool.spent_share,
        "held_share": pool.held_share,
        "remaining_share": pool.remaining_share,
        "held_by": list(holders),
        "spent_epsilon": accounting.renyi_to_epsilon(
            pool.spent / pricing.UNITS_PER_NAT, pool.renyi_order, pool.delta
        ),
        "admission": f"{theorems['filter']}; {theorems['concurrency']}",
        "cost": theorems["renyi"],
        "cap_and_spent_epsilon": theorems["conversion"],
        "epsilon_of_one_job": theorems["pld"],
        **disjoint,
    }
