"""The verbs on the vault: its keys, and what crashes left in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmos.workflows.parts import Parts

if TYPE_CHECKING:
    from datetime import timedelta

    from llmos.crypto.root_keys import RootKeyProvider
    from llmos.kernel.root import Ask


@dataclass(frozen=True, slots=True)
class VaultVerbs:
    """What can be done with the keys that all others are wrapped under."""

    parts: Parts

    def rotate(self) -> dict[str, int]:
        """Give the tenant a new key, wrap every object's key under it, destroy the old one."""
        from llmos.workflows import vault

        return vault.rotate(self.parts.who, self.parts)

    def rekey(self, to: RootKeyProvider, *, ask: Ask | None = None) -> None:
        """Change how the root key is kept; the root key and all that it opens stay."""
        from llmos.workflows import vault

        vault.rekey(to, self.parts.who, self.parts, ask=ask)

    def sweep(self, *, older_than: timedelta | None = None) -> dict[str, int]:
        """Remove objects that nothing names and files without a key, left behind by crashes."""
        from llmos.workflows import sweep

        age = sweep.DEFAULT_AGE if older_than is None else older_than
        return sweep.run(self.parts.who, self.parts, older_than=age)

    def versions(self) -> list[dict[str, Any]]:
        """Return a line for each version of a tenant's key, oldest first."""
        from llmos.workflows import vault

        return vault.versions(self.parts)
