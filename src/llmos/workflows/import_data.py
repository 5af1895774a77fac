"""Import a file as a dataset: check the terms, read every row, then store all of it or nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmos.data.canaries import DEFAULT_TEMPLATE, make_canaries
from llmos.data.datasets import DatasetCard
from llmos.data.importers import Columns, read_rows
from llmos.data.terms import DatasetTerms
from llmos.errors import DataError
from llmos.kernel.identity import Principal
from llmos.kernel.pools import Part
from llmos.privacy import Classification, PrivacyLoss, PrivacyUnit, check_delta, check_epsilon
from llmos.workflows.parts import Parts


@dataclass(frozen=True, slots=True)
class ImportRequest:
    """A file, how to read it, and what may be done with it."""

    path: Path  # .jsonl, .csv or .parquet
    name: str
    columns: Columns  # the unit column among them
    classification: Classification
    purposes: tuple[str, ...]
    epsilon: float  # lifetime budget of every unit
    delta: float
    holdout_fraction: float = 0.0  # of the units, in [0, 1)
    canaries: int = 0  # made; a fair coin decides on planting each
    canary_template: str = DEFAULT_TEMPLATE
    part_epsilons: Mapping[Part, float] = field(default_factory=dict)  # parts of `epsilon`
    parents: tuple[str, ...] = ()  # datasets that the file was made from


def request(
    path: Path,
    *,
    name: str | None,
    unit: str,
    text: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    classification: str,
    purposes: tuple[str, ...],
    epsilon: float,
    delta: float,
    holdout_fraction: float = 0.0,
    canaries: int = 0,
    canary_template: str = DEFAULT_TEMPLATE,
    purpose_epsilons: Mapping[str, float] | None = None,
    tenant_epsilons: Mapping[str, float] | None = None,
    parents: tuple[str, ...] = (),
) -> ImportRequest:
    """Make a request from what people type; without a name the file's name is taken.

    A part of the budget is that of a purpose, of a tenant, or of TENANT/PURPOSE.

    Raises:
        DataError: neither a text column nor a prompt and a completion column are named, or both
            are; the classification is unknown.
    """
    try:
        known = Classification(classification)
    except ValueError:
        raise DataError(
            f"unknown classification {classification!r}",
            hint=f"one of: {', '.join(Classification)}",
        ) from None
    return ImportRequest(
        path=path,
        name=re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-") if name is None else name,
        columns=_columns(unit, text, prompt, completion),
        classification=known,
        purposes=purposes,
        epsilon=epsilon,
        delta=delta,
        holdout_fraction=holdout_fraction,
        canaries=canaries,
        canary_template=canary_template,
        part_epsilons={
            **{Part(name): epsilon for name, epsilon in (purpose_epsilons or {}).items()},
            **{_of_tenant(name): epsilon for name, epsilon in (tenant_epsilons or {}).items()},
        },
        parents=parents,
    )


def _of_tenant(text: str) -> Part:
    tenant, _, purpose = text.partition("/")
    return Part(purpose or None, tenant)


def _columns(unit: str, text: str | None, prompt: str | None, completion: str | None) -> Columns:
    if text is not None and prompt is None and completion is None:
        return Columns(unit=unit, completion=text)
    if text is None and prompt is not None and completion is not None:
        return Columns(unit=unit, prompt=prompt, completion=completion)
    raise DataError(
        "which columns are to be learnt is not clear",
        hint="name either one text column, or a prompt column and a completion column",
    )


def run(request: ImportRequest, who: Principal, parts: Parts) -> DatasetCard:
    """Import the file and return the new dataset's card.

    Raises:
        InvalidPrivacyParameter: epsilon or delta is none; checked before the file is opened.
        DatasetExists: the name is taken.
        DataError: the file, a row, a name or a number cannot be used; nothing was imported.
        PermissionDenied: policy does not let `who` import it.
    """
    terms = DatasetTerms(
        name=request.name,
        classification=request.classification,
        purposes=request.purposes,
        total=PrivacyLoss(
            epsilon=check_epsilon(float(request.epsilon)),
            delta=check_delta(float(request.delta)),
            unit=PrivacyUnit(request.columns.unit),
        ),
        holdout_fraction=request.holdout_fraction,
        part_epsilons={
            part: check_epsilon(float(epsilon)) for part, epsilon in request.part_epsilons.items()
        },
        parents=request.parents,
    )
    return parts.datasets.import_records(
        who,
        terms,
        read_rows(request.path, request.columns),
        format=request.columns.format,
        book=make_canaries(request.canaries, request.canary_template),
    )
