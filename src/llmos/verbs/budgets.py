"""The verbs on budgets: explain, price, raise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmos.workflows.parts import Parts

if TYPE_CHECKING:
    from llmos.kernel.approvals import Approval
    from llmos.workflows.what_if import WhatIf


@dataclass(frozen=True, slots=True)
class BudgetVerbs:
    """What can be done with privacy budgets."""

    parts: Parts

    def explain(self, pool: str) -> dict[str, Any]:
        """Return a pool's numbers, each with the theorem that stands behind it."""
        from llmos.workflows import budget_advice

        ledger = self.parts.kernel.budget
        family = self.parts.datasets.cards()
        return budget_advice.explain(ledger.pool(pool), ledger.holders(pool), family)

    def what_if(self, dataset: str, **job: Any) -> WhatIf:  # noqa: ANN401 - see the workflow
        """Price a training without reserving anything; takes the arguments of `what_if.run`."""
        from llmos.workflows import what_if

        return what_if.run(dataset, self.parts, **job)

    def propose_raise(self, pool: str, *, epsilon: float, reason: str) -> Approval:
        """Propose a larger budget; another person decides."""
        from llmos.workflows import raise_cap

        return raise_cap.run(pool, epsilon, reason, self.parts.who, self.parts)
