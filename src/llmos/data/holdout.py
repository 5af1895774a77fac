"""Splitting a dataset into what is trained on and what is only measured on, by whole units."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from llmos.data.records import Record
from llmos.errors import DataError


def check_fraction(fraction: float) -> float:
    """Return a held-out fraction if some units can be held out and some be trained on.

    Raises:
        DataError: it lies outside [0, 1) or is not a number.
    """
    if not 0 <= fraction < 1:
        raise DataError(
            f"the held-out fraction must be at least 0 and below 1, not {fraction}",
            hint="0.2 holds out about a fifth of the units",
        )
    return fraction


def split(records: Iterable[Record], fraction: float) -> tuple[list[Record], list[Record]]:
    """Return training and held-out records; each unit falls by an independent CSPRNG coin.

    A split by time, source or position would let an attack tell members apart by what they say and
    measure that instead of leakage.

    Raises:
        DataError: the fraction is out of range, or no unit is left to train on.
    """
    check_fraction(fraction)
    csprng = secrets.SystemRandom()
    held_out: dict[str, bool] = {}  # by unit
    training: list[Record] = []
    holdout: list[Record] = []
    for record in records:
        if record.unit not in held_out:
            held_out[record.unit] = csprng.random() < fraction
        (holdout if held_out[record.unit] else training).append(record)
    if not training:
        raise DataError(
            "no unit is left to train on",
            hint="choose a smaller held-out fraction, or import more units",
        )
    return training, holdout
