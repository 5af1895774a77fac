"""The terms of a dataset: what its steward decides when it is imported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from llmos.data.holdout import check_fraction
from llmos.errors import DataError, InvalidPrivacyParameter
from llmos.kernel.pools import Part, pool_id
from llmos.privacy import Classification, PrivacyLoss

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


def check_name(word: str, what: str) -> str:
    """Return a name that policies and files cannot misread.

    Raises:
        DataError: it has other characters than those, or too many.
    """
    if not _NAME.fullmatch(word):
        raise DataError(
            f"{word!r} cannot be {what}",
            hint="use up to 63 lower-case letters, digits and dashes, no dash in front",
        )
    return word


class Block(NamedTuple):
    """One of the parts of a dataset that share no person; `number` counts from 1."""

    of: str
    number: int
    blocks: int


@dataclass(frozen=True, slots=True)
class DatasetTerms:
    """What the steward decides about a dataset when it is imported."""

    name: str
    classification: Classification
    purposes: tuple[str, ...]
    total: PrivacyLoss  # the lifetime budget, per unit of `total.unit.column`
    holdout_fraction: float = 0.0  # of the units, in [0, 1)
    part_epsilons: Mapping[Part, float] = field(default_factory=dict)  # parts of `total`
    parents: tuple[str, ...] = ()  # datasets of the same people that it was made from
    block: Block | None = None

    def __post_init__(self) -> None:
        """Refuse names and purposes that policies and files could misread."""
        check_name(self.name, "a dataset name")
        for purpose in self.purposes:
            check_name(purpose, "a purpose")
        for part, epsilon in self.part_epsilons.items():
            if part.tenant is not None:
                check_name(part.tenant, "a tenant")
            if part.purpose is not None and part.purpose not in self.purposes:
                raise DataError(
                    f"{part.purpose!r} is no purpose of {self.name}",
                    hint=f"add --purpose {part.purpose}",
                )
            if not epsilon <= self.total.epsilon:
                raise InvalidPrivacyParameter(
                    f"epsilon of {pool_id(self.name, part)}",
                    epsilon,
                    f"at most {self.total.epsilon:g}, the whole",
                )
        if not self.purposes:
            raise DataError(
                f"dataset {self.name} has no purpose", hint="say what it may be used for"
            )
        check_fraction(self.holdout_fraction)
