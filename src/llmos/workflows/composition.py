"""The privacy loss of several trainings of the same data, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from llmos.kernel import accounting
from llmos.privacy import Mechanism

_ORDERS: Final = (*range(2, 33), *range(36, 65, 4), 96, 128, 192, 256)


def epsilon(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Return an epsilon, in nats, that is proven for all mechanisms together at `delta`.

    One mechanism has its tight epsilon. Of several, the Renyi divergences at each order add, also
    where a later one starts from what an earlier one released (Mironov 2017, arXiv:1702.07476,
    proposition 1); the best order counts. As for every composition with fixed parameters, those of
    the later mechanism must not be chosen by what the earlier one released; the pool's filter
    holds without that.

    Raises:
        InvalidPrivacyParameter: delta is no probability.
        UnaccountableMechanism: a divergence is no number.
    """
    if len(mechanisms) == 1:
        return accounting.epsilon(mechanisms[0], delta)
    return min(
        accounting.renyi_to_epsilon(
            sum(accounting.renyi(mechanism, float(order)) for mechanism in mechanisms),
            float(order),
            delta,
        )
        for order in _ORDERS
    )
