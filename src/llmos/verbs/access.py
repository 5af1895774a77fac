"""The verbs on people, programs and their keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from llmos.accounts import api_keys
from llmos.errors import ConfigError, UnknownModel
from llmos.kernel.identity import IssuedKey, Kind, Principal
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
        actions: Sequence[str] = (),
        purpose: str | None = None,
        days: int | None = None,
    ) -> IssuedKey:
        """Make an API key; its token is shown once. What is given narrows it, nothing widens it.

        Raises:
            UnknownModel: there is no such model.
            ConfigError: there is no such action.
        """
        known = {entry.name for entry in self.parts.registry.models()}
        for model in models:
            if model not in known:
                raise UnknownModel(f"no model {model!r}", hint="`llmos model ls` lists them")
        if unknown := sorted(set(actions) - set(Action)):
            raise ConfigError(f"unknown action {unknown[0]!r}", hint=f"one of: {', '.join(Action)}")
        owner = self._kernel.identity.principal(user or self.parts.who.name)
        expires = None if days is None else datetime.now(UTC) + timedelta(days=days)
        details = {
            "owner": owner.name,
            "models": list(models) or ["*"],
            "actions": list(actions) or ["*"],
            "purpose": purpose,
            "label": label,
        }
        with self._kernel.monitor.act(
            self.parts.who, Action.MANAGE_KEYS, self._kernel.home, details=details, context={}
        ) as conn:
            return self._kernel.identity.create_key(
                conn,
                owner,
                label,
                frozenset(models) or None,
                expires,
                actions=frozenset(actions) or None,
                purpose=purpose,
            )

    def keys(self) -> list[dict[str, Any]]:
        """Return a line for each API key; never its secret."""
        with self._kernel.store.read() as conn:
            issued = api_keys.issued(conn)
        return [
            {
                "id": key.id,
                "principal": key.principal,
                "label": key.label,
                "models": ["*"] if key.models is None else sorted(key.models),
                "actions": ["*"] if key.actions is None else sorted(key.actions),
                "purpose": key.purpose,
                "created_at": key.created_at,
                "expires_at": key.expires_at,
                "revoked_at": key.revoked_at,
                "last_used_at": key.last_used_at,
            }
            for key in issued
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

    def rotate_key(self, key_id: str, *, overlap: timedelta) -> IssuedKey:
        """Issue a key with the same rights; the old one ends after the overlap."""
        from llmos.workflows import people

        return people.rotate_key(key_id, overlap, self.parts.who, self.parts)

    def add_user(
        self, name: str, roles: Sequence[str], *, kind: str = "person", tenant: str | None = None
    ) -> Principal:
        """Add a person, or a service account, to a tenant or to none.

        Raises:
            ConfigError: a role or the kind is unknown.
            PrincipalExists: the name is taken.
        """
        from llmos.workflows import people

        try:
            wanted = Kind(kind)
        except ValueError:
            raise ConfigError(f"unknown kind {kind!r}", hint=f"one of: {', '.join(Kind)}") from None
        return people.add(name, frozenset(roles), wanted, self.parts.who, self.parts, tenant=tenant)

    @property
    def _kernel(self) -> Kernel:
        return self.parts.kernel
