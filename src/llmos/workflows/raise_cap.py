"""Raise the cap of a budget: one person proposes it, another one's decision does it."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Connection

from llmos.errors import InvalidPrivacyParameter
from llmos.kernel import caps
from llmos.kernel.approvals import Approval
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.privacy import check_epsilon
from llmos.workflows.parts import Parts

ACT: Final = "raise-cap"


def run(pool: str, epsilon: float, reason: str, who: Principal, parts: Parts) -> Approval:
    """Propose a larger epsilon for a whole pool; nothing changes before someone else approves.

    Raises:
        UnknownDataset: there is no such pool.
        InvalidPrivacyParameter: epsilon is none, or not larger than the pool's.
        ApprovalConflict: there is no reason.
        PermissionDenied: policy does not let `who` manage this dataset's budget.
    """
    present = parts.kernel.budget.pool(pool)
    if not check_epsilon(epsilon) > present.epsilon:
        raise InvalidPrivacyParameter(
            "epsilon", epsilon, f"more than the {present.epsilon:g} that {pool} has"
        )
    resource = parts.datasets.card(present.dataset).resource
    details: dict[str, Any] = {"pool": pool, "epsilon": epsilon, "from_epsilon": present.epsilon}
    with parts.kernel.monitor.act(who, Action.MANAGE_BUDGET, resource, details=details) as conn:
        asked = parts.kernel.approvals.propose(conn, who, ACT, pool, dict(details), reason)
        details |= {"approval": asked.id, "reason": reason}
    return asked


def perform(conn: Connection, approved: Approval) -> None:
    """Do what was approved, in the transaction of the approval.

    Raises:
        InvalidPrivacyParameter: the pool has that much by now.
    """
    epsilon = float(approved.request["epsilon"])  # JSON has no difference between 10 and 10.0
    caps.raise_cap(conn, approved.subject, epsilon, approval=approved.id)
