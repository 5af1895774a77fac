"""What a training starts from: a base model, or a federated adapter on one.

A site's own adapter on top of a federated one is stored as the sum of the two, which is one plain
adapter of the base model (`models.lora_sum`).
"""

from __future__ import annotations

from llmos.data.datasets import DatasetCard
from llmos.errors import ModelError
from llmos.federations import manifest as manifests
from llmos.federations.manifest import Masked
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.models.registry import ModelEntry, ModelKind, Registry
from llmos.privacy import Classification, Mechanism
from llmos.workflows import composition
from llmos.workflows.origin import dataset_of
from llmos.workflows.parts import Parts
from llmos.workflows.training_request import Start, TrainRequest


def find(model: str, card: DatasetCard, registry: Registry) -> tuple[ModelEntry, Start | None]:
    """Return the base model of a training, and the federated adapter that it starts from, if any.

    Raises:
        UnknownModel: there is no model of this name.
        ModelError: it is an adapter of this home alone, or has learnt other data of this home.
    """
    entry = registry.model(model)
    if entry.kind is ModelKind.BASE:
        return entry, None
    base = registry.model(entry.base or "")
    if "federated" not in entry.card:
        raise ModelError(
            f"{model} is an adapter; training starts from a base model or from a federated one",
            hint=f"use --model {base.name}",
        )
    learnt = dataset_of(entry)
    if learnt not in (None, card.name):
        raise ModelError(
            f"{model} has learnt from {learnt}; what is trained on top of it learns from the same",
            hint="the losses of a person in two datasets would not add up",
        )
    return base, Start(
        model=model,
        digest=entry.digest,
        job=entry.card["job"],
        learnt=learnt is not None,
        private=entry.card["private"],
    )


def authorize(request: TrainRequest, who: Principal, parts: Parts) -> None:
    """Return if policy lets `who` use the adapter that the training starts from, for its purpose.

    Raises:
        PermissionDenied: it does not; the denial is recorded.
    """
    if request.start is not None:
        resource = parts.registry.model(request.start.model).resource
        context = {"purpose": request.purpose}
        parts.kernel.monitor.authorize(who, Action.CHAT, resource, context=context)


def locate(start: Start, registry: Registry) -> str:
    """Return the vault object of the adapter that a training starts from.

    Raises:
        UnknownModel: it is no longer there.
        ModelError: another one has its name now.
    """
    entry = registry.model(start.model)
    if entry.digest != start.digest:
        raise ModelError(f"{start.model} is another model than when this training was planned")
    return entry.location


def epsilon_in_all(request: TrainRequest, mechanism: Mechanism, parts: Parts) -> float | None:
    """Return the epsilon of a planned training together with what it starts from, if it has one."""
    start = request.start
    if start is None or request.delta is None or not (start.learnt and start.private):
        return None
    earlier = parts.kernel.budget.reservation(start.job).mechanism
    return composition.epsilon((mechanism, earlier), request.delta)


def colluding_sites(start: Start | None, registry: Registry) -> int | None:
    """Return how many sites may help the coordinator of what a training starts from, at most.

    With more of them its epsilon is a weaker one. None where it has none, or none that depends on
    other sites.
    """
    if start is None or not (start.learnt and start.private):
        return None
    manifest = manifests.parse(registry.model(start.model).card["federated"])
    shared, aggregation = manifest.shared_noise, manifest.aggregation
    if shared is None or not isinstance(aggregation, Masked):
        return None
    return aggregation.threshold - shared.honest


def classification(start: Start | None, card: DatasetCard, registry: Registry) -> str:
    """Return the class of what a trained model has learnt: the worse of data and start."""
    if start is None or card.classification is Classification.SENSITIVE:
        return str(card.classification)
    return str(registry.model(start.model).resource.attributes["classification"])
