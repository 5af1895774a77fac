"""The terms of a dataset: what its steward decides when it is imported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from llmos.data.holdout import check_fraction
from llmos.errors import DataError, InvalidPrivacyParameter
from llmos.privacy import Classification, PrivacyLoss

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


@dataclass(frozen=True, slots=True)
class DatasetTerms:
    """What the steward decides about a dataset when it is imported."""

    name: str
    classification: Classification
    purposes: tuple[str, ...]
    total: PrivacyLoss  # the lifetime budget, per unit of `total.unit.column`
    holdout_fraction: float = 0.0  # of the units, in [0, 1)
    purpose_epsilons: Mapping[str, float] = field(default_factory=dict)  # parts of `total`
    parents: tuple[str, ...] = ()  # datasets of the same people that it was made from

    def __post_init__(self) -> None:
        """Refuse names and purposes that policies and files could misread."""
        for purpose, epsilon in self.purpose_epsilons.items():
            if purpose not in self.purposes:
                raise DataError(
                    f"{purpose!r} is no purpose of {self.name}", hint=f"add --purpose {purpose}"
                )
            if not epsilon <= self.total.epsilon:
                raise InvalidPrivacyParameter(
                    f"epsilon of {purpose}", epsilon, f"at most {self.total.epsilon:g}, the whole"
                )
        for word, what in (
            (self.name, "a dataset name"),
            *((p, "a purpose") for p in self.purposes),
        ):
            if not _NAME.fullmatch(word):
                raise DataError(
                    f"{word!r} cannot be {what}",
                    hint="use up to 63 lower-case letters, digits and dashes, no dash in front",
                )
        if not self.purposes:
            raise DataError(
                f"dataset {self.name} has no purpose", hint="say what it may be used for"
            )
        check_fraction(self.holdout_fraction)
