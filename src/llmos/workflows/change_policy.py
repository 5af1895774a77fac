"""Change the policies: one person proposes a folder, another one's decision puts it in force."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection

from llmos.errors import ApprovalConflict, PolicyError
from llmos.kernel import policy_versions
from llmos.kernel.approvals import Approval
from llmos.kernel.identity import Kind, Principal
from llmos.kernel.kernel import Kernel
from llmos.kernel.policy import Action, Policy
from llmos.kernel.schema import standing_digest
from llmos.kernel.store import now
from llmos.workflows.parts import Parts

ACT: Final = "policy"


def run(folder: Path, reason: str, who: Principal, parts: Parts) -> Approval:
    """Propose the policies of a folder; those in force stay until someone else approves.

    Raises:
        PolicyError: they are not valid, or nobody could ever change them again.
        ApprovalConflict: they are in force already, there is no reason, or `who` is a service.
        PermissionDenied: policy does not let `who` change policies.
    """
    kernel = parts.kernel
    proposed = Policy.load(folder)
    with kernel.store.read() as conn:
        present = policy_versions.in_force(conn)
    if present is not None and present.digest == proposed.digest:
        raise ApprovalConflict(f"the policies of {folder} are in force already")
    _require_a_way_back(proposed, parts)
    request: dict[str, Any] = {"digest": proposed.digest, "files": sorted(proposed.files)}
    details = dict(request)
    with kernel.monitor.act(who, Action.MANAGE_POLICY, kernel.home, details=details) as conn:
        policy_versions.keep(conn, proposed)
        asked = kernel.approvals.propose(conn, who, ACT, proposed.digest, request, reason)
        details |= {"approval": asked.id, "reason": reason}
    return asked


def perform(conn: Connection, approved: Approval) -> None:
    """Put what was approved in force, in the transaction of the approval.

    Raises:
        IntegrityError: it is not what was proposed.
    """
    policy_versions.version(conn, approved.subject)
    policy_versions.enact(conn, approved.subject)


def adopt(kernel: Kernel) -> None:
    """Record the policies of a home made before there were versions, and keep to them from now on.

    Until then they were whatever its files said; this is done when such a home is opened first.
    """
    with kernel.store.read() as conn:
        if policy_versions.in_force(conn) is not None:
            return
    entry = {
        "v": 1,
        "at": now(),
        "actor": "llmos",
        "action": str(Action.MANAGE_POLICY),
        "resource": str(kernel.home),
        "outcome": "done",
        "details": {"act": "adopt", "digest": kernel.policy.digest},
    }
    with kernel.store.transaction() as conn:
        policy_versions.keep(conn, kernel.policy)
        policy_versions.enact(conn, kernel.policy.digest)
        kernel.auditlog.append(conn, entry | {"state": standing_digest(conn)})


def recorded(kernel: Kernel) -> str | None:
    """Return the digest of the policies that the log knows to be in force; None before any record.

    Whoever can write to kernel.db could name other policies there, but has no key to sign the log.
    """
    found = None
    for entry in kernel.auditlog.entries(-1, kernel.auditlog.verify().size):
        match entry.fields:
            case {"action": "init", "details": {"policy_digest": str(digest)}}:
                found = digest
            case {"action": Action.MANAGE_POLICY, "details": {"act": "adopt", "digest": digest}}:
                found = digest
            case {
                "action": Action.APPROVE,
                "outcome": "done",
                "details": {"act": "policy", "approved": True, "subject": digest},
            }:
                found = digest
    return found


def _require_a_way_back(proposed: Policy, parts: Parts) -> None:
    """Refuse policies under which no two people could propose and approve other ones."""
    people = [p for p in parts.kernel.identity.principals() if p.kind is Kind.PERSON]

    def may(action: Action) -> set[str]:
        return {p.name for p in people if proposed.decide(p, action, parts.kernel.home, {}).allowed}

    proposers, deciders = may(Action.MANAGE_POLICY), may(Action.APPROVE)
    if not proposers or not deciders or len(proposers | deciders) < 2:  # noqa: PLR2004 - two people
        raise PolicyError(
            "under these policies no two people of this home could change them again",
            hint=f"let one {Action.MANAGE_POLICY} and another one {Action.APPROVE}",
        )
