"""Trainings in the queue: submit a plan as a job, try a failed one again, cancel one.

Nothing here computes, so none of it waits for the learning stack; `training_job` does the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Connection

from llmos.errors import BudgetExceeded, ConfigError, JobBusy, JobError
from llmos.jobs.jobs import JobState, Step
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.kernel.pools import Part
from llmos.privacy import mechanism_to_dict
from llmos.workflows import starting_point, training_acts
from llmos.workflows.books import request_digest
from llmos.workflows.budget_advice import with_advice
from llmos.workflows.ctrl_c import stopped_by_ctrl_c
from llmos.workflows.parts import Parts
from llmos.workflows.training_request import TrainRequest

if TYPE_CHECKING:
    from llmos.workflows.training_plan import TrainPlan

KIND: Final = "train"


def submit(plan: TrainPlan, who: Principal, parts: Parts) -> str:
    """Authorise the plan, reserve its budget and store it as a job, in one transaction.

    Raises:
        PermissionDenied: policy forbids it (sensitive data without privacy, wrong purpose).
        BudgetExceeded: the dataset's pool cannot pay; says what would still fit.
    """
    try:
        return _submit(plan, who, parts)
    except BudgetExceeded as refused:
        mechanism = plan.request.plan.mechanism
        assert mechanism is not None  # noqa: S101 - without one nothing is charged
        raise with_advice(refused, mechanism, parts.kernel.budget) from None


def _submit(plan: TrainPlan, who: Principal, parts: Parts) -> str:
    request, kernel = plan.request, parts.kernel
    starting_point.authorize(request, who, parts)
    action, resource, context = training_acts.act(request, plan.card)
    mechanism = request.plan.mechanism
    part = Part(request.purpose, request.tenant)
    if mechanism is not None:
        kernel.budget.precompute(request.dataset, part, mechanism)
    stored = request.model_dump(mode="json")
    details: dict[str, Any] = {
        "step": "submit",
        **training_acts.public(request),
        "dataset": request.dataset,
        "request_sha256": request_digest(stored),
    }
    with kernel.monitor.act(who, action, resource, details=details, context=context) as conn:
        job_id = parts.jobs.submit(conn, KIND, who.name, stored)
        details["job"] = job_id
        if mechanism is not None:
            reserved = kernel.budget.reserve(
                conn,
                job_id,
                request.dataset,
                request.fingerprint,
                plan.card.unit_column,
                mechanism,
                part=part,
            )
            details["mechanism"] = mechanism_to_dict(mechanism)
            details["costs"] = {pool: str(cost) for pool, cost in reserved.costs.items()}
    return job_id


def run(
    job_id: str, fit: Step, who: Principal, parts: Parts, *, interrupt: Event
) -> dict[str, Any]:
    """Run a submitted job to its end, or go on with one that was cut off, and return its result.

    Args:
        job_id: the job.
        fit: its first step, which computes; it is called under the job's lease.
        who: who acts.
        parts: of the home.
        interrupt: set by Ctrl-C; the job then stops at a step boundary.

    Raises:
        JobBusy: another process runs it.
        JobInterrupted, JobCancelled: it stopped at a step boundary because it was asked to.
        StorageFull: a checkpoint could not be written; the one before it is still good.
    """
    publish = partial(training_acts.publish, who=who, parts=parts)
    with stopped_by_ctrl_c(interrupt):
        job = parts.jobs.run(job_id, {"fit": fit, "publish": publish})
    return job.result or {}


def retry(job_id: str, who: Principal, parts: Parts, *, reason: str) -> None:
    """Put a failed job back into the queue, and record why.

    Raises:
        ConfigError: the reason is empty.
        PermissionDenied: it is another's job, and policy lets `who` manage only their own.
        JobError: the job has not failed.
    """
    if not reason.strip():
        raise ConfigError("a job is not tried again without a reason", hint="--reason TEXT")
    details = {"retry": job_id, "reason": reason}
    with _managing(job_id, who, parts, details) as conn:
        parts.jobs.retry(conn, job_id)


def cancel(job_id: str, who: Principal, parts: Parts) -> JobState:
    """Ask a running job to stop; settle one that no process runs for the steps it has done.

    Raises:
        PermissionDenied: it is another's job, and policy lets `who` manage only their own.
        JobError: the job has ended already.
    """
    jobs = parts.jobs
    with _managing(job_id, who, parts, {"cancel": job_id}) as conn:
        jobs.request_cancel(conn, job_id)
    try:
        steps = {"cancel": lambda job, _results: training_acts.cancel(job, who, parts)}
        return jobs.run(job_id, steps).state
    except JobBusy:
        return JobState.RUNNING  # whoever runs it sees the request
    except JobError:
        if (state := jobs.job(job_id).state) is not JobState.CANCELLED:
            raise
        return state  # whoever ran it has seen the request already


@contextmanager
def _managing(
    job_id: str, who: Principal, parts: Parts, details: Mapping[str, Any]
) -> Iterator[Connection]:
    """Yield the transaction of an act on a job: of one's own training, or of another's job."""
    kernel = parts.kernel
    action, resource = Action.MANAGE_JOBS, kernel.home
    context: dict[str, str] = {}
    if (job := parts.jobs.job(job_id)).principal == who.name:
        request = TrainRequest.model_validate(job.request)
        action, resource, context = training_acts.act(request, parts.datasets.card(request.dataset))
    with kernel.monitor.act(who, action, resource, details=details, context=context) as conn:
        yield conn
