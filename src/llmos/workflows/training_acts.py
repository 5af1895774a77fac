"""The acts of a training job: what it asks and is charged, how it is published or cancelled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from sqlalchemy import Connection

from llmos.data.datasets import DatasetCard
from llmos.jobs.jobs import Job, JobState
from llmos.kernel import accounting
from llmos.kernel.identity import Principal
from llmos.kernel.monitor import Charge, Grant
from llmos.kernel.policy import Action, Resource
from llmos.kernel.pools import Part
from llmos.privacy import PrivacyUnit
from llmos.workflows import starting_point
from llmos.workflows.origin import guarantee, of_request
from llmos.workflows.parts import Parts
from llmos.workflows.training_request import TrainRequest


def act(request: TrainRequest, card: DatasetCard) -> tuple[Action, Resource, dict[str, str]]:
    """Return what policy is asked about a training: the action, the dataset and the purpose."""
    private = request.noise_multiplier is not None
    action = Action.TRAIN_PRIVATE if private else Action.TRAIN_WITHOUT_PRIVACY
    return action, card.resource, {"purpose": request.purpose}


def charge(request: TrainRequest, card: DatasetCard) -> Charge | None:
    """Return what a training costs whom; None without privacy."""
    mechanism = request.plan.mechanism
    if mechanism is None:
        return None
    unit = PrivacyUnit(card.unit_column).column
    part = Part(request.purpose, request.tenant)
    return Charge(card.name, part, card.fingerprint, unit, mechanism)


def public(request: TrainRequest) -> dict[str, Any]:
    """Return the numbers of a request that its log records carry."""
    settings = ("steps", "batch", "clip", "noise_multiplier", "delta")
    names = ("model", "output", *settings, "purpose", "tenant")
    said = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    start = request.start
    return said if start is None else said | {"starts_from": start.model_dump(mode="json")}


@contextmanager
def closing(
    job: Job, who: Principal, parts: Parts, step: str, details: Mapping[str, Any]
) -> Iterator[tuple[Grant | None, Connection]]:
    """Yield the grant of the job's charge, if any, and the transaction that ends the job."""
    request = TrainRequest.model_validate(job.request)
    card = parts.datasets.card(request.dataset)
    action, resource, context = act(request, card)
    monitor = parts.kernel.monitor
    facts = {"step": step, "job": job.id, **public(request), **details}
    with ExitStack() as stack:
        grant = None
        if (cost := charge(request, card)) is not None:
            grant = stack.enter_context(
                monitor.admit(
                    who,
                    action,
                    resource,
                    key=job.id,
                    objects=(),
                    charge=cost,
                    context=context,
                    details={"step": f"before {step}"},
                )
            )
        conn = stack.enter_context(
            monitor.act(who, action, resource, details=facts, context=context)
        )
        yield grant, conn


def publish(
    job: Job, results: Mapping[str, dict[str, Any]], *, who: Principal, parts: Parts
) -> dict[str, Any]:
    """Settle, register the adapter and end the job in one transaction."""
    request = TrainRequest.model_validate(job.request)
    kernel, fitted = parts.kernel, results["fit"]
    card = parts.datasets.card(request.dataset)
    mechanism = request.plan.mechanism
    epsilon = None if mechanism is None else accounting.epsilon(mechanism, request.delta or 0.0)
    result = {
        "model": request.output,
        "epsilon": epsilon,
        "delta": request.delta,
        **{name: fitted[name] for name in ("steps", "seconds", "tokens_per_s", "digest")},
    }
    checkpoint = parts.jobs.job(job.id).checkpoint
    facts = {"digest": fitted["digest"]}
    with closing(job, who, parts, "publish", facts) as (grant, conn):
        if grant is not None and mechanism is not None:
            grant.settle(mechanism, conn=conn, details={"step": "settle"})
        parts.registry.publish_adapter(
            conn,
            name=request.output,
            base=request.model,
            object_id=fitted["adapter"],
            digest=fitted["digest"],
            card=_model_card(job, request, card, fitted, parts),
        )
        parts.jobs.set_checkpoint(conn, job, None)
        parts.jobs.finish(conn, job, JobState.DONE, result)
    if checkpoint is not None:
        kernel.vault.delete(checkpoint)
    return result


def cancel(job: Job, who: Principal, parts: Parts) -> dict[str, Any]:
    """Charge a cancelled job for the steps recorded in the ledger, and end it."""
    request = TrainRequest.model_validate(job.request)
    kernel = parts.kernel
    mechanism = request.plan.mechanism
    steps = 0 if mechanism is None else kernel.budget.reservation(job.id).steps_done
    checkpoint = parts.jobs.job(job.id).checkpoint
    with closing(job, who, parts, "cancel", {"steps_done": steps}) as (grant, conn):
        if grant is not None and mechanism is not None:
            if steps == 0:
                grant.abort(conn=conn)
            else:
                grant.settle(mechanism.after(steps), conn=conn, details={"step": "settle"})
        parts.jobs.set_checkpoint(conn, job, None)
        parts.jobs.finish(conn, job, JobState.CANCELLED, {"steps": steps})
    if checkpoint is not None:
        kernel.vault.delete(checkpoint)
    return {"steps": steps}


def _model_card(
    job: Job,
    request: TrainRequest,
    card: DatasetCard,
    fitted: Mapping[str, Any],
    parts: Parts,
) -> dict[str, Any]:
    """Return what the registry keeps about a trained adapter."""
    loss = guarantee(of_request(job.id, job.request), parts)
    start = request.start
    if start is not None and not start.private:
        loss = None  # what other homes' data lost without a guarantee is in it too
    epsilon = None if loss is None else loss.epsilon
    return {
        "dataset": request.dataset,
        "fingerprint": request.fingerprint,
        "classification": starting_point.classification(start, card, parts.registry),
        "job": job.id,
        "private": epsilon is not None,
        "epsilon": epsilon,
        "delta": request.delta,
        "request": request.model_dump(mode="json"),
        **{name: fitted[name] for name in ("steps", "randomness", "seconds", "dtype_path")},
        "self_test": fitted["self_test"],
    }
