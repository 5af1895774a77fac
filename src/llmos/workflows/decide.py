"""Decide on what someone else proposed; an approved act is done in the same transaction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from sqlalchemy import Connection

from llmos.data import erasures
from llmos.kernel.approvals import Approval
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.workflows import change_policy, erase, export, raise_cap, shred
from llmos.workflows.parts import Parts

# What is done when an act is approved, one line an act.
_ACTS: Final[Mapping[str, Callable[[Connection, Approval], None]]] = MappingProxyType(
    {
        raise_cap.ACT: raise_cap.perform,
        erasures.ACT: erase.perform,
        change_policy.ACT: change_policy.perform,
        export.ACT: export.perform,
    }
)


def run(approval_id: str, who: Principal, parts: Parts, *, approve: bool) -> Approval:
    """Approve or refuse a proposal.

    Raises:
        UnknownApproval: there is none of this id.
        ApprovalConflict: it was decided before, or `who` may not be the one who decides.
        PermissionDenied: policy does not let `who` approve anything here.
    """
    kernel = parts.kernel
    asked = kernel.approvals.approval(approval_id)
    details: dict[str, Any] = {
        "approval": asked.id,
        "act": asked.act,
        "subject": asked.subject,
        "request": asked.request,
        "approved": approve,
    }
    with kernel.monitor.act(who, Action.APPROVE, kernel.home, details=details) as conn:
        decided = kernel.approvals.decide(conn, who, approval_id, approve=approve)
        if approve:
            _ACTS[asked.act](conn, decided)
    shred.finish(parts)
    return decided
