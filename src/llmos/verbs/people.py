"""The verbs on who is known here: roles, passwords, codes, logging in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmos.kernel.identity import IssuedKey
from llmos.workflows.parts import Parts


@dataclass(frozen=True, slots=True)
class PeopleVerbs:
    """Who acts here."""

    parts: Parts

    def overview(self) -> list[dict[str, Any]]:
        """Return a line for each principal that was not disabled, by name."""
        from llmos.workflows import people

        return people.overview(self.parts)

    def set_roles(self, name: str, roles: Sequence[str]) -> None:
        """Trust a principal with these roles and no others."""
        from llmos.workflows import people

        people.set_roles(name, frozenset(roles), self.parts.who, self.parts)

    def set_tenant(self, name: str, tenant: str | None) -> None:
        """Let the jobs that a principal plans from now on count for a tenant, or for none."""
        from llmos.workflows import people

        people.set_tenant(name, tenant, self.parts.who, self.parts)

    def disable(self, name: str) -> None:
        """Refuse a principal and all of its keys from now on."""
        from llmos.workflows import people

        people.disable(name, self.parts.who, self.parts)

    def proves_password(self, name: str) -> bool:
        """Tell whether changing this person's password or codes takes their present password."""
        from llmos.workflows import people

        return name == self.parts.who.name and people.has_password(name, self.parts)

    def set_password(self, name: str, password: str, *, present: str = "") -> None:
        """Give a person a new password."""
        from llmos.workflows import people

        people.set_password(name, password, self.parts.who, self.parts, present=present)

    def set_codes(self, name: str, seed: bytes | None, code: str, *, present: str = "") -> None:
        """Ask a person for codes of this seed too, or with None for none."""
        from llmos.workflows import people

        people.set_codes(name, seed, code, self.parts.who, self.parts, present=present)

    def log_in(self, name: str, password: str, code: str = "") -> IssuedKey:
        """Return an API key for some hours."""
        from llmos.workflows import login

        return login.run(name, password, code, self.parts)
