"""Values that say what is protected, how much was lost and what was run; no accounting here."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from llmos.errors import InvalidPrivacyParameter, UnaccountableMechanism

MECHANISM_SCHEMA: Final = "llmos.mechanism/v1"


class Neighboring(StrEnum):
    """Which two datasets a guarantee compares."""

    ADD_OR_REMOVE_ONE = "add-or-remove-one"
    REPLACE_ONE = "replace-one"


class Classification(StrEnum):
    """How sensitive a dataset is; `sensitive` forbids training without privacy."""

    PUBLIC = "public"
    SYNTHETIC = "synthetic"
    SENSITIVE = "sensitive"


@dataclass(frozen=True, slots=True)
class PrivacyUnit:
    """The protected entity: all records that share one value of `column`."""

    column: str

    def __post_init__(self) -> None:
        """Refuse an empty column name."""
        if not self.column:
            raise InvalidPrivacyParameter("unit", self.column, "the name of a column")


def check_epsilon(epsilon: float) -> float:
    """Return epsilon if it is a finite number above zero.

    Raises:
        InvalidPrivacyParameter: epsilon is zero, negative, infinite or not a number.
    """
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise InvalidPrivacyParameter("epsilon", epsilon, "a finite number above 0")
    return epsilon


def check_delta(delta: float) -> float:
    """Return delta if it is a probability strictly between zero and one.

    Raises:
        InvalidPrivacyParameter: delta lies outside (0, 1) or is not a number.
    """
    if not (math.isfinite(delta) and 0 < delta < 1):
        raise InvalidPrivacyParameter("delta", delta, "above 0 and below 1")
    return delta


@dataclass(frozen=True, slots=True)
class PrivacyLoss:
    """An (epsilon, delta) guarantee for one privacy unit; there is deliberately no `+`."""

    epsilon: float  # nats; math.inf means no guarantee
    delta: float  # a probability
    unit: PrivacyUnit
    neighboring: Neighboring = Neighboring.ADD_OR_REMOVE_ONE

    def __post_init__(self) -> None:
        """Refuse values that are no guarantee at all."""
        if math.isnan(self.epsilon) or self.epsilon < 0:
            raise InvalidPrivacyParameter("epsilon", self.epsilon, "0 or more, or infinity")
        if not 0 <= self.delta < 1:
            raise InvalidPrivacyParameter("delta", self.delta, "at least 0 and below 1")

    def within(self, limit: PrivacyLoss) -> bool:
        """Tell whether this loss is no larger than `limit`.

        Raises:
            UnaccountableMechanism: the two speak of different units or adjacencies.
        """
        if (self.unit, self.neighboring) != (limit.unit, limit.neighboring):
            raise UnaccountableMechanism(
                f"a loss per {self.unit.column} ({self.neighboring}) cannot be compared with a "
                f"limit per {limit.unit.column} ({limit.neighboring})"
            )
        return self.epsilon <= limit.epsilon and self.delta <= limit.delta


@dataclass(frozen=True, slots=True)
class PoissonSampledGaussian:
    """`steps` Gaussian releases, each over a Poisson sample of the privacy units.

    `noise_multiplier` is the noise's standard deviation over the clip norm; each unit enters a
    step independently with `sampling_probability` (Abadi et al. 2016, arXiv:1607.00133).
    """

    sampling_probability: float  # in (0, 1]
    noise_multiplier: float  # standard deviation / clip norm, above 0
    steps: int  # 0 or more

    def __post_init__(self) -> None:
        """Refuse parameters for which no theorem holds."""
        if not 0 < self.sampling_probability <= 1:
            raise InvalidPrivacyParameter(
                "sampling_probability", self.sampling_probability, "above 0 and at most 1"
            )
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise InvalidPrivacyParameter(
                "noise_multiplier", self.noise_multiplier, "a finite number above 0"
            )
        if not (isinstance(self.steps, int) and self.steps >= 0):
            raise InvalidPrivacyParameter("steps", self.steps, "a whole number, 0 or more")

    def after(self, steps: int) -> PoissonSampledGaussian:
        """Return the same mechanism stopped after `steps` releases."""
        return replace(self, steps=steps)


JsonScalar = str | int | float

Mechanism = PoissonSampledGaussian  # the one kind that this version can account for


def mechanism_to_dict(mechanism: Mechanism) -> dict[str, JsonScalar]:
    """Describe a mechanism as plain JSON values, with schema and type."""
    return {
        "schema": MECHANISM_SCHEMA,
        "type": "poisson-sampled-gaussian",
        "sampling_probability": mechanism.sampling_probability,
        "noise_multiplier": mechanism.noise_multiplier,
        "steps": mechanism.steps,
    }


def mechanism_from_dict(fields: dict[str, JsonScalar]) -> Mechanism:
    """Read a mechanism back; only allow-listed types are ever built.

    Raises:
        UnaccountableMechanism: schema, type or field names are not the known ones.
        InvalidPrivacyParameter: a value lies outside its range.
    """
    unknown = UnaccountableMechanism(f"unknown mechanism: {fields!r}")
    match fields:
        case {
            "schema": schema,
            "type": "poisson-sampled-gaussian",
            "sampling_probability": int() | float() as sampling_probability,
            "noise_multiplier": int() | float() as noise_multiplier,
            "steps": int() as steps,
            **rest,
        } if schema == MECHANISM_SCHEMA and not rest and bool not in map(type, fields.values()):
            try:
                return PoissonSampledGaussian(
                    float(sampling_probability), float(noise_multiplier), steps
                )
            except OverflowError as error:
                raise unknown from error
    raise unknown
