"""What mechanisms cost in the ledger's integers, and what a given amount can still pay for."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from typing import Any, Final

from llmos.errors import BudgetExceeded
from llmos.kernel import accounting
from llmos.kernel.pools import PoolState
from llmos.privacy import Mechanism

UNITS_PER_NAT: Final = 10**12
TOO_MUCH: Final = 2**63  # the first amount that no database integer holds


def cost(mechanism: Mechanism, order: float) -> int:
    """Return the divergence in 1e-12 nats, rounded up for each step, plus one unit a step.

    Rounding each step makes the cost of a stopped job an exact part of what was reserved; the
    additional unit is more than the floating-point error of one step (below 1e-15 nats).
    """
    if mechanism.steps == 0:
        return 0
    step = accounting.renyi(mechanism.after(1), order)
    if math.isinf(step):
        return TOO_MUCH
    return mechanism.steps * (math.ceil(Fraction(step) * UNITS_PER_NAT) + 1)


@lru_cache(maxsize=256)
def feasible(mechanism: Mechanism, order: float, delta: float, available: int) -> dict[str, float]:
    """Return what would fit into `available`, changing one of noise, steps and epsilon."""
    steps = available // cost(mechanism.after(1), order)
    noise = accounting.least_noise(
        lambda noise: cost(replace(mechanism, noise_multiplier=noise), order) <= available,
        start=mechanism.noise_multiplier,
    )
    if math.isinf(noise):
        return {"epsilon": 0.0, "steps": float(steps)}
    noise = accounting.round_up(noise)
    epsilon = accounting.epsilon(replace(mechanism, noise_multiplier=noise), delta)
    return {
        "epsilon": accounting.round_down(epsilon),
        "steps": float(steps),
        "noise_multiplier": noise,
    }


def refusal(pool: PoolState, mechanism: Mechanism, holders: tuple[str, ...]) -> BudgetExceeded:
    """Say what was asked, what is left, who holds the rest, and what would fit."""
    fitting = feasible(mechanism, pool.renyi_order, pool.delta, pool.remaining)
    share = cost(mechanism, pool.renyi_order) / pool.cap
    held_by = f" by {', '.join(holders)}" if holders else ""
    hint = (
        f"this would fit: epsilon {fitting['epsilon']:g} at delta {pool.delta:g}, or a noise "
        f"multiplier of {fitting['noise_multiplier']:g}, or {fitting['steps']:.0f} steps"
        if "noise_multiplier" in fitting
        else "nothing of this kind fits any more; the budget of these people is used up"
    )
    return BudgetExceeded(
        pool.dataset,
        f"{pool.id} cannot pay for this: it takes {share:.2%} of the privacy budget and "
        f"{pool.remaining_share:.2%} is left (spent {pool.spent_share:.2%}, "
        f"held {pool.held_share:.2%}{held_by})",
        hint=hint,
        feasible=fitting,
    )


def explanation(pool: PoolState, holders: tuple[str, ...]) -> dict[str, Any]:
    """Return a pool's numbers as JSON values, with the theorems that stand behind them."""
    theorems = accounting.THEOREMS
    return {
        "pool": pool.id,
        "dataset": pool.dataset,
        "purpose": pool.purpose,
        "unit": pool.total.unit.column,
        "neighboring": str(pool.total.neighboring),
        "epsilon": pool.epsilon,
        "delta": pool.delta,
        "renyi_order": pool.renyi_order,
        "cap_nats": pool.cap / UNITS_PER_NAT,
        "spent_share": pool.spent_share,
        "held_share": pool.held_share,
        "remaining_share": pool.remaining_share,
        "held_by": list(holders),
        "spent_epsilon": accounting.renyi_to_epsilon(
            pool.spent / UNITS_PER_NAT, pool.renyi_order, pool.delta
        ),
        "admission": f"{theorems['filter']}; {theorems['concurrency']}",
        "cost": theorems["renyi"],
        "cap_and_spent_epsilon": theorems["conversion"],
        "epsilon_of_one_job": theorems["pld"],
    }
