"""What a mechanism costs: the only place that speaks to Google's `dp_accounting`.

Two accountants serve two questions. The privacy loss distribution (PLD) gives the tight epsilon of
one mechanism that was planned in advance; it is what certificates print. The Renyi divergence at
one fixed order is what pools are charged, because jobs are chosen after earlier results were seen
and only a privacy filter composes those.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Final

from llmos.errors import UnaccountableMechanism
from llmos.privacy import Mechanism, Neighboring, check_delta, check_epsilon

FINE_INTERVAL: Final = 1e-4  # nats between two values of a privacy loss distribution
GREATEST_EPSILON: Final = 1e5  # beyond it nothing is protected, and the arithmetic overflows
LEAST_ORDER: Final = 2.0
GREATEST_ORDER: Final = 256.0

# Orders for quick upper bounds on epsilon, from which searches start.
_QUICK_ORDERS: Final = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 128, 256)
LEAST_NOISE: Final = 1e-6  # below it the arithmetic overflows; the divergence is above 1e12


@lru_cache(maxsize=4096)
def epsilon(
    mechanism: Mechanism, delta: float, neighboring: Neighboring = Neighboring.ADD_OR_REMOVE_ONE
) -> float:
    """Return the least epsilon, in nats, that is proven for one pre-declared mechanism at `delta`.

    The distribution is rounded to intervals of 1e-4, wider only where epsilon is above 10; rounding
    is pessimistic, so the result is an upper bound at every interval. Infinity is returned where
    the Renyi bound is above 1e5. Source:
    Koskela, Jalko, Honkela 2020, arXiv:1906.03049; Doroshenko et al. 2022, arXiv:2207.04380.

    Raises:
        InvalidPrivacyParameter: delta is no probability.
    """
    bound = quick_epsilon(mechanism, check_delta(delta))
    if bound > GREATEST_EPSILON:
        return math.inf
    return pld_epsilon(mechanism, delta, neighboring, FINE_INTERVAL * max(1.0, bound / 10))


@lru_cache(maxsize=4096)
def renyi(mechanism: Mechanism, order: float) -> float:
    """Return the Renyi divergence, in nats, at one order under add-or-remove-one.

    Composition adds, so the divergence of `steps` steps is that of one step times `steps`.
    Source: Mironov, Talwar, Zhang 2019, arXiv:1908.10530, section 3.3.

    Raises:
        UnaccountableMechanism: the order is no integer from 2 to 256, where the closed form is
            exact, or the divergence is no number.
    """
    if not (order.is_integer() and LEAST_ORDER <= order <= GREATEST_ORDER):
        raise UnaccountableMechanism(f"no exact Renyi divergence is known at order {order}")
    if mechanism.steps == 0:
        return 0.0
    divergence = mechanism.steps * float(_step_divergences(mechanism, (int(order),))[0])
    if not divergence >= 0:
        raise UnaccountableMechanism(f"the divergence of {mechanism} at order {order} is no number")
    return divergence


def fixed_order(epsilon: float, delta: float) -> float:
    """Return the order of a new pool: 0.8 (1 + 2 ln(1/delta) / epsilon), as an integer in [2, 256].

    For plain Gaussian noise 1 + 2 ln(1/delta) / epsilon is the best order. The divergence of a
    *subsampled* Gaussian explodes beyond an order that depends on the noise: at epsilon 3 the best
    Gaussian order admits no job with noise 1, and 0.8 of it admits five, at no loss for the others.
    It is an integer because the closed form is exact there; at fractional orders only a looser
    series is known, which need not converge. Above 256 nothing is gained and arithmetic is slow.

    Raises:
        InvalidPrivacyParameter: epsilon or delta is out of range.
    """
    gaussian_best = 1 + 2 * math.log(1 / check_delta(delta)) / check_epsilon(epsilon)
    return float(round(min(max(0.8 * gaussian_best, LEAST_ORDER), GREATEST_ORDER)))


def renyi_cap(epsilon: float, delta: float, order: float) -> float:
    """Return the largest total divergence, in nats, that still implies (epsilon, delta).

    Proposition 12 of arXiv:2004.00010, solved for it; zero or less means that the order cannot
    prove (epsilon, delta) for anything.

    Raises:
        InvalidPrivacyParameter: epsilon or delta is out of range.
    """
    return check_epsilon(epsilon) - _conversion_gap(order, delta)


def renyi_to_epsilon(divergence: float, order: float, delta: float) -> float:
    """Return the epsilon, in nats, that a divergence at one order implies at `delta`.

    Proposition 12 of arXiv:2004.00010; a divergence of zero is no loss at all.

    Raises:
        InvalidPrivacyParameter: delta is no probability.
    """
    gap = _conversion_gap(order, delta)
    return max(0.0, divergence + gap) if divergence > 0 else 0.0


def _conversion_gap(order: float, delta: float) -> float:
    """Return epsilon minus divergence in Proposition 12 of arXiv:2004.00010."""
    return math.log1p(-1 / order) - (math.log(check_delta(delta)) + math.log(order)) / (order - 1)


def quick_epsilon(mechanism: Mechanism, delta: float) -> float:
    """Return a rough upper bound on epsilon in about a millisecond; infinity if there is none."""
    divergences = _step_divergences(mechanism, _QUICK_ORDERS)
    return min(
        renyi_to_epsilon(mechanism.steps * divergence, order, delta)
        for order, divergence in zip(_QUICK_ORDERS, divergences, strict=True)
    )


def _step_divergences(mechanism: Mechanism, orders: tuple[int, ...]) -> list[float]:
    """Return the Renyi divergence of one step at each order."""
    from dp_accounting import rdp  # noqa: PLC0415 - takes a second to load

    if mechanism.noise_multiplier < LEAST_NOISE:
        return [math.inf] * len(orders)
    accountant = rdp.RdpAccountant(list(orders))
    accountant.compose(_event(mechanism.after(1)))
    return [float(divergence) for divergence in accountant.rdp]


def pld_epsilon(
    mechanism: Mechanism, delta: float, neighboring: Neighboring, interval: float
) -> float:
    """Return epsilon from a privacy loss distribution over multiples of `interval`."""
    import dp_accounting  # noqa: PLC0415 - takes a second to load
    from dp_accounting import pld  # noqa: PLC0415

    if mechanism.steps == 0:
        return 0.0
    relation = {
        Neighboring.ADD_OR_REMOVE_ONE: dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
        Neighboring.REPLACE_ONE: dp_accounting.NeighboringRelation.REPLACE_ONE,
    }[neighboring]
    accountant = pld.PLDAccountant(relation, value_discretization_interval=interval)
    accountant.compose(_event(mechanism))
    return float(accountant.get_epsilon(delta))


def _event(mechanism: Mechanism) -> Any:  # noqa: ANN401 - dp_accounting.DpEvent, loaded lazily
    """Translate a mechanism into dp_accounting's language."""
    import dp_accounting  # noqa: PLC0415 - takes a second to load

    step = dp_accounting.PoissonSampledDpEvent(
        mechanism.sampling_probability, dp_accounting.GaussianDpEvent(mechanism.noise_multiplier)
    )
    return dp_accounting.SelfComposedDpEvent(step, mechanism.steps)
