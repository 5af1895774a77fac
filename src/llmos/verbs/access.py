"""The verbs on people, programs, their keys and the policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from llmos.errors import ConfigError, UnknownModel
from llmos.kernel.identity import IssuedKey, Principal, Role
from llmos.kernel.kernel import Kernel
from llmos.kernel.policy import Action
from llmos.workflows.parts import Parts


@dataclass(frozen=True, slots=True)
class AccessVerbs:
    """Who may do what."""

    parts: Parts

    def create_key(
        self,
        *,
        user: str | None = None,
        label: str = "",
        models: Sequence[str] = (),
        days: int | None = None,
    ) -> IssuedKey:
        """Make an API key; its token is shown once."""
        known = {entry.name for entry in self.parts.registry.models()}
        for model in models:
            if model not in known:
                raise UnknownModel(f"no model {model!r}", hint="`llmos model ls` lists them")
        owner = self._kernel.identity.principal(user or self.parts.who.name)
        expires = None if days is None else datetime.now(UTC) + timedelta(days=days)
        details = {"owner": owner.name, "models": list(models) or ["*"], "label": label}
        with self._kernel.monitor.act(
            self.parts.who, Action.MANAGE_KEYS, self._kernel.home, details=details, context={}
        ) as conn:
            return self._kernel.identity.create_key(
                conn, owner, label, frozenset(models) or None, expires
            )

    def keys(self) -> list[dict[str, Any]]:
        """Return a line for each API key; never its secret."""
        return [
            {
                "id": key.id,
                "principal": key.principal,
                "label": key.label,
                "models": ["*"] if key.models is None else sorted(key.models),
                "created_at": key.created_at,
                "expires_at": key.expires_at,
                "revoked_at": key.revoked_at,
            }
            for key in self._kernel.identity.keys()  # noqa: SIM118 - not a mapping's
        ]

    def revoke_key(self, key_id: str) -> None:
        """Revoke an API key at once."""
        with self._kernel.monitor.act(
            self.parts.who,
            Action.MANAGE_KEYS,
            self._kernel.home,
            details={"revoke": key_id},
            context={},
        ) as conn:
            self._kernel.identity.revoke_key(conn, key_id)

    def add_user(self, name: str, roles: Sequence[str]) -> Principal:
        """Add a person or program.

        Raises:
            ConfigError: a role is unknown.
            PrincipalExists: the name is taken.
        """
        if unknown := sorted(set(roles) - set(Role)):
            raise ConfigError(f"unknown role {unknown[0]!r}", hint=f"one of: {', '.join(Role)}")
        with self._kernel.monitor.act(
            self.parts.who,
            Action.MANAGE_KEYS,
            self._kernel.home,
            details={"user": name, "roles": sorted(roles)},
            context={},
        ) as conn:
            return self._kernel.identity.add_principal(
                conn, name, frozenset(Role(role) for role in roles)
            )

    def test_policy(
        self, user: str, action: str, dataset: str | None, model: str | None, purpose: str
    ) -> dict[str, Any]:
        """Ask the policy what it would decide, without acting."""
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
        decision = self._kernel.policy.decide(
            self._kernel.identity.principal(user), asked, resource, {"purpose": purpose}
        )
        return {
            "allowed": decision.allowed,
            "policies": list(decision.policies),
            "reason": decision.reason,
        }

    @property
    def _kernel(self) -> Kernel:
        return self.parts.kernel
