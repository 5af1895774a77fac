"""The verbs on acts that take two people."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from llmos.kernel.kernel import Kernel
from llmos.kernel.schema import principals
from llmos.workflows.parts import Parts

if TYPE_CHECKING:
    from llmos.kernel.approvals import Approval


@dataclass(frozen=True, slots=True)
class ApprovalVerbs:
    """What can be done with proposals."""

    parts: Parts

    def overview(self) -> list[dict[str, Any]]:
        """Return every proposal with its people by name, oldest first."""
        return [self._facts(found) for found in self._kernel.approvals.approvals()]

    def facts(self, approval_id: str) -> dict[str, Any]:
        """Return one proposal with its people by name."""
        return self._facts(self._kernel.approvals.approval(approval_id))

    def decide(self, approval_id: str, *, approve: bool) -> dict[str, Any]:
        """Approve or refuse what another person proposed; an erasure has a `receipt` then."""
        from llmos.data import erasures
        from llmos.workflows import decide, shred

        decided = decide.run(approval_id, self.parts.who, self.parts, approve=approve)
        facts = self._facts(decided)
        if decided.act == erasures.ACT and approve:
            reports = self._kernel.config.home / "reports"
            facts["receipt"] = str(shred.receipt_path(reports, approval_id))
        return facts

    def _facts(self, approval: Approval) -> dict[str, Any]:
        with self._kernel.store.read() as conn:  # those who were disabled since, too
            rows = conn.execute(select(principals.c.id, principals.c.name))
            names = {row.id: row.name for row in rows}
        people = {"proposer": names[approval.proposer]}
        if approval.decider is not None:
            people["decider"] = names[approval.decider]
        return asdict(approval) | people

    @property
    def _kernel(self) -> Kernel:
        return self.parts.kernel
