"""What a steward says to a federated job at their site: yes, no, or no longer."""

from __future__ import annotations

from typing import Any

from llmos.errors import ConfigError
from llmos.federations import invitations
from llmos.federations.invitations import Invitation, InvitationState
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.workflows.parts import Parts


def approve(job_id: str, who: Principal, parts: Parts) -> Invitation:
    """Approve exactly the manifest that was proposed; the site's agent then answers for it.

    Raises:
        UnknownJob: there is none of this id.
        JobError: it was decided before.
        UnknownDataset: this site has no dataset of the manifest's name.
        PermissionDenied: policy does not let `who` approve.
    """
    return _decide(job_id, who, parts, InvitationState.APPROVED, "", InvitationState.PROPOSED)


def refuse(job_id: str, who: Principal, parts: Parts, *, reason: str) -> Invitation:
    """Refuse a job before it runs.

    Raises:
        ConfigError: there is no reason.
        UnknownJob, JobError, PermissionDenied: as in `approve`.
    """
    before = (InvitationState.PROPOSED, InvitationState.APPROVED)
    return _decide(job_id, who, parts, InvitationState.REFUSED, _said(reason), *before)


def withdraw(job_id: str, who: Principal, parts: Parts, *, reason: str) -> Invitation:
    """Stop taking part: the agent stops at the next step; what was run stays charged.

    Raises:
        ConfigError: there is no reason.
        UnknownJob, JobError, PermissionDenied: as in `approve`.
    """
    before = (InvitationState.APPROVED, InvitationState.RUNNING)
    return _decide(job_id, who, parts, InvitationState.WITHDRAWN, _said(reason), *before)


def _decide(
    job_id: str,
    who: Principal,
    parts: Parts,
    decision: InvitationState,
    reason: str,
    *before: InvitationState,
) -> Invitation:
    kernel = parts.kernel
    asked = invitations.invitation(kernel.store, job_id)
    resource = kernel.home
    if decision is InvitationState.APPROVED:
        resource = parts.datasets.card(asked.manifest.dataset).resource
    details: dict[str, Any] = {
        "federated_job": job_id,
        "decision": str(decision),
        "manifest_sha256": asked.manifest.digest,
    }
    if reason:
        details["reason"] = reason
    with kernel.monitor.act(who, Action.APPROVE, resource, details=details) as conn:
        invitations.change(
            conn, job_id, *before, state=decision, decider=who.id, reason=reason or None
        )
    return invitations.invitation(kernel.store, job_id)


def _said(reason: str) -> str:
    if not reason.strip():
        raise ConfigError(
            "a job is not refused or withdrawn without a reason", hint="--reason TEXT"
        )
    return reason
