"""The verbs on the access policies: read, check, ask, explain, change."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmos.errors import ConfigError
from llmos.kernel.kernel import Kernel
from llmos.kernel.policy import Action, Policy, Resource
from llmos.workflows.parts import Parts

if TYPE_CHECKING:
    from llmos.kernel.approvals import Approval
    from llmos.workflows.explain_policy import Explanation


@dataclass(frozen=True, slots=True)
class PolicyVerbs:
    """What is allowed."""

    parts: Parts

    def in_force(self) -> Policy:
        """Return the policies in force since this process began."""
        return self._kernel.policy

    def test(
        self,
        user: str,
        action: str,
        *,
        dataset: str | None = None,
        model: str | None = None,
        purpose: str | None = None,
    ) -> dict[str, Any]:
        """Ask the policy what it would decide, without acting."""
        asked, resource, context = self._question(action, dataset, model, purpose)
        who = self._kernel.identity.principal(user)
        decision = self._kernel.policy.decide(who, asked, resource, context)
        return {
            "allowed": decision.allowed,
            "policies": list(decision.policies),
            "reason": decision.reason,
        }

    def explain(
        self,
        user: str,
        action: str,
        *,
        dataset: str | None = None,
        model: str | None = None,
        purpose: str | None = None,
    ) -> Explanation:
        """Say which policies decide, word for word, and what would make it another decision."""
        from llmos.workflows import explain_policy

        asked, resource, context = self._question(action, dataset, model, purpose)
        who = self._kernel.identity.principal(user)
        return explain_policy.run(self._kernel.policy, who, asked, resource, context)

    def propose(self, folder: str | Path | None = None, *, reason: str) -> Approval:
        """Propose the policies of a folder, by default the home's drafts."""
        from llmos.workflows import change_policy

        place = self._kernel.config.home / "policy" if folder is None else Path(folder)
        return change_policy.run(place, reason, self.parts.who, self.parts)

    def _question(
        self, action: str, dataset: str | None, model: str | None, purpose: str | None
    ) -> tuple[Action, Resource, dict[str, str]]:
        try:
            asked = Action(action)
        except ValueError:
            raise ConfigError(
                f"unknown action {action!r}", hint=f"one of: {', '.join(Action)}"
            ) from None
        resource = self._kernel.home
        if dataset is not None:
            resource = self.parts.datasets.card(dataset).resource
        elif model is not None:
            resource = self.parts.registry.model(model).resource
        if purpose is None and dataset is not None:
            purpose = "training"
        context = {} if purpose is None else {"purpose": purpose}
        if asked is Action.LOGIN:
            context["second_factor"] = "none"
        return asked, resource, context

    @property
    def _kernel(self) -> Kernel:
        return self.parts.kernel
