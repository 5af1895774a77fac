"""What a steward says to a federated job at their site: yes, no, or no longer."""

from __future__ import annotations

from typing import Any

from llmos.errors import ConfigError, TamperedLog
from llmos.federations import invitations
from llmos.federations.invitations import Invitation, InvitationState
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.workflows import logged
from llmos.workflows.parts import Parts


def given(job: Invitation, parts: Parts) -> str | None:
    """Return the id of who approved this very manifest and stands by it, as the log has it.

    The job's row is no evidence: whoever writes to kernel.db could have approved it.

    Raises:
        TamperedLog: the row names somebody, and the log has no decision about the job.
    """
    if job.decider is None:
        return None
    done = {"action": str(Action.APPROVE), "outcome": "done"}
    said: dict[str, Any] | None = None
    for entry in logged.entries(parts):
        details = entry.fields["details"]
        if details.get("federated_job") == job.id and done.items() <= entry.fields.items():
            said = details
    if said is None:
        raise TamperedLog(
            f"kernel.db has a decision about {job.id} that is not in the log",
            hint="someone changed kernel.db: llmos log verify, then restore a backup",
        )
    stands = (str(InvitationState.APPROVED), job.manifest.digest)
    return said["decider"] if (said["decision"], said["manifest_sha256"]) == stands else None


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
        "decider": who.id,
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
