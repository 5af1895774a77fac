"""What mechanisms cost in the ledger's integers, and how a pool refuses one."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Final

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


def refusal(pool: PoolState, mechanism: Mechanism, holders: tuple[str, ...]) -> BudgetExceeded:
    """Say what was asked, what is left and who holds the rest."""
    share = cost(mechanism, pool.renyi_order) / pool.cap
    held_by = f" by {', '.join(holders)}" if holders else ""
    return BudgetExceeded(
        pool.id,
        f"{pool.id} cannot pay for this: it takes {share:.2%} of the privacy budget and "
        f"{pool.remaining_share:.2%} is left (spent {pool.spent_share:.2%}, "
        f"held {pool.held_share:.2%}{held_by})",
    )
