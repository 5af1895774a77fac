"""What a model's leak report is measured against, and where it is kept; needs no learning stack."""

from __future__ import annotations

from pathlib import Path

from llmos.data.datasets import DatasetCard
from llmos.kernel import accounting
from llmos.models.registry import ModelEntry
from llmos.privacy import PrivacyLoss, PrivacyUnit
from llmos.workflows.parts import Parts
from llmos.workflows.training_request import TrainRequest


def report_path(home: Path, model: str) -> Path:
    """Return where a model's leak report is kept."""
    return home / "reports" / f"{model}.leak.json"


def guarantee(entry: ModelEntry, card: DatasetCard, parts: Parts) -> PrivacyLoss | None:
    """Derive a model's guarantee from what its ledger entry says was run; None without one."""
    request = TrainRequest.model_validate(entry.card["request"])
    if request.noise_multiplier is None or request.delta is None:
        return None
    run_mechanism = parts.kernel.budget.reservation(entry.card["job"]).mechanism
    return PrivacyLoss(
        accounting.epsilon(run_mechanism, request.delta),
        request.delta,
        PrivacyUnit(card.unit_column),
    )
