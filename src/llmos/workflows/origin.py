"""How a model of this home was trained: on which data, for what, and under which guarantee."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmos.errors import MeasurementError
from llmos.federations import manifest as manifests
from llmos.federations.manifest import Manifest
from llmos.models.registry import ModelEntry
from llmos.privacy import PrivacyLoss, PrivacyUnit
from llmos.workflows.composition import epsilon
from llmos.workflows.parts import Parts


@dataclass(frozen=True, slots=True)
class Origin:
    """One training of this home's data: by itself, or as a site of a federation."""

    job: str  # key of its reservation
    dataset: str
    purpose: str
    max_tokens: int
    delta: float | None  # None: without a guarantee
    earlier: str | None = None  # key of a training of the same data that it started from


def dataset_of(entry: ModelEntry) -> str | None:
    """Return the dataset of this home that a model has learnt; a coordinator's has learnt none."""
    dataset = entry.card.get("dataset")
    return None if dataset is None else str(dataset)


def origin(entry: ModelEntry) -> Origin:
    """Read how an adapter was trained.

    Raises:
        MeasurementError: it has learnt no data of this home.
    """
    if dataset_of(entry) is None:
        raise MeasurementError(
            f"{entry.name} has learnt no data of this home",
            hint="measure it at a site that took part in its training",
        )
    if "federated" in entry.card:
        return of_manifest(manifests.parse(entry.card["federated"]))
    return of_request(entry.card["job"], entry.card["request"])


def of_request(job: str, request: Mapping[str, Any]) -> Origin:
    """Read how a training of this home alone was asked for."""
    start = request.get("start") or {}
    earlier = start["job"] if start.get("learnt") else None
    private = request["noise_multiplier"] is not None and (earlier is None or start["private"])
    return Origin(
        job=job,
        dataset=request["dataset"],
        purpose=request["purpose"],
        max_tokens=request["max_tokens"],
        delta=request["delta"] if private else None,
        earlier=earlier,
    )


def of_manifest(manifest: Manifest) -> Origin:
    """Read how a federated training was asked for."""
    return Origin(
        job=manifest.id,
        dataset=manifest.dataset,
        purpose=manifest.purpose,
        max_tokens=manifest.local.max_tokens,
        delta=None if manifest.privacy is None else manifest.privacy.delta,
    )


def guarantee(origin: Origin, parts: Parts) -> PrivacyLoss | None:
    """Derive a guarantee from what the ledger says was run, or is to be run at most; or none."""
    if origin.delta is None:
        return None
    jobs = filter(None, (origin.job, origin.earlier))
    mechanisms = [parts.kernel.budget.reservation(job).mechanism for job in jobs]
    unit = parts.datasets.card(origin.dataset).unit_column
    return PrivacyLoss(epsilon(mechanisms, origin.delta), origin.delta, PrivacyUnit(unit))
