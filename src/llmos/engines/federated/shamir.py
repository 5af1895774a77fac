"""Shamir's secret sharing of 32-byte secrets (Shamir 1979, "How to Share a Secret").

Shares are points of a random polynomial over a public prime field, at x = 1, 2, ..., n; its value
at 0 is the secret. Python's integers do not take constant time: whoever measures a site's processor
while it makes or joins shares is not kept out.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from functools import lru_cache
from typing import Final

from llmos.errors import AggregationAborted, UpdateRefused

PRIME: Final = 2**256 + 297  # the smallest prime above every 32-byte secret
SECRET_BYTES: Final = 32
SHARE_BYTES: Final = 33  # of a field element


def share(secret: bytes, *, threshold: int, shares: int) -> list[bytes]:
    """Split a secret so that any `threshold` shares give it back and fewer say nothing about it.

    Returns:
        The shares at x = 1, ..., `shares`.

    Raises:
        ValueError: the secret is not 32 bytes, or no polynomial fits these numbers.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= shares < PRIME:
        raise ValueError("a secret has 32 bytes, and 1 <= threshold <= shares")
    coefficients = [
        int.from_bytes(secret, "big"),
        *(secrets.randbelow(PRIME) for _ in range(threshold - 1)),
    ]
    return [_evaluate(coefficients, x).to_bytes(SHARE_BYTES, "big") for x in range(1, shares + 1)]


def reconstruct(shares: Mapping[int, bytes], *, threshold: int, owner: str) -> bytes:
    """Return the secret of which `shares` holds points by their x.

    Shares beyond the threshold are held against the polynomial of the others, so that one wrong
    share is seen where there is one to spare.

    Args:
        shares: at least `threshold` points.
        threshold: of the sharing.
        owner: the site whose secret it is, named in refusals.

    Raises:
        AggregationAborted: there are fewer shares than the threshold.
        UpdateRefused: a share is no field element, is out of place, or they do not fit together.
    """
    if len(shares) < threshold:
        raise AggregationAborted(
            f"{len(shares)} of the {threshold} shares that the secret of {owner} needs are there"
        )
    points = {x: parse_share(value, owner) for x, value in sorted(shares.items())}
    if not all(0 < x < PRIME for x in points):
        raise UpdateRefused(owner, "a share has no place among the sites")
    base = tuple(points)[:threshold]
    for x in tuple(points)[threshold:]:
        if _interpolate(points, base, x) != points[x]:
            raise UpdateRefused(owner, "the shares of its secret do not fit together")
    secret = _interpolate(points, base, 0)
    if secret >> (8 * SECRET_BYTES):
        raise UpdateRefused(owner, "the shares of its secret do not fit together")
    return secret.to_bytes(SECRET_BYTES, "big")


def parse_share(value: bytes, site: str) -> int:
    """Read a share.

    Raises:
        UpdateRefused: it is no element of the field.
    """
    number = int.from_bytes(value, "big")
    if len(value) != SHARE_BYTES or number >= PRIME:
        raise UpdateRefused(site, "a share is no element of the field")
    return number


def _evaluate(coefficients: list[int], x: int) -> int:
    """Horner's rule."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % PRIME
    return value


def _interpolate(points: Mapping[int, int], base: tuple[int, ...], at: int) -> int:
    return sum(points[x] * w for x, w in zip(base, _weights(base, at), strict=True)) % PRIME


@lru_cache(maxsize=1024)  # one round joins many secrets of the same sites
def _weights(base: tuple[int, ...], at: int) -> tuple[int, ...]:
    """Return Lagrange's weights of the points `base` for the value at `at`.

    Each is the product of all `at - other` but its own, from the products before and behind it.
    """
    before, behind = [1], [1]
    for other in base[:-1]:
        before.append(before[-1] * (at - other) % PRIME)
    for other in base[:0:-1]:
        behind.append(behind[-1] * (at - other) % PRIME)
    terms = zip(before, reversed(behind), _inverse_differences(base), strict=True)
    return tuple(front * back * inverse % PRIME for front, back, inverse in terms)


@lru_cache(maxsize=1024)
def _inverse_differences(base: tuple[int, ...]) -> tuple[int, ...]:
    """Return for each point of `base` 1 / the product of its differences to the others."""
    return tuple(
        pow(math.prod(x - other for other in base if other != x) % PRIME, -1, PRIME) for x in base
    )
