"""The verbs on the audit log and its partners."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rfc8785

from llmos.errors import ConfigError
from llmos.kernel.kernel import Kernel
from llmos.kernel.policy import Action
from llmos.workflows.parts import Parts

if TYPE_CHECKING:
    from llmos.workflows.cosign import Cosigning
    from llmos.workflows.partners import Cosigned, Partner


@dataclass(frozen=True, slots=True)
class LogVerbs:
    """What can be done with the log."""

    parts: Parts

    def read(self, *, after: int = -1, limit: int = 50) -> list[tuple[int, dict[str, Any]]]:
        """Return entries of the audit log with their indices."""
        self._kernel.monitor.authorize(self.parts.who, Action.READ_LOG, self._kernel.home)
        return [(e.index, e.fields) for e in self._kernel.auditlog.entries(after, limit)]

    def verify(self) -> int:
        """Recompute the whole log, check all cosignatures and the books; return the log's size."""
        from llmos.workflows import books, partners

        self._kernel.monitor.authorize(self.parts.who, Action.READ_LOG, self._kernel.home)
        partners.cosigned(self.parts)
        size = self._kernel.auditlog.verify().size
        books.check(self._kernel, self.parts.jobs)
        return size

    def cosigned(self) -> list[Cosigned]:
        """Return which partner cosigned which size of the log, newest first."""
        from llmos.workflows import partners

        self._kernel.monitor.authorize(self.parts.who, Action.READ_LOG, self._kernel.home)
        return partners.cosigned(self.parts)

    def add_partner(self, name: str, vkey: str, *, url: str | None = None) -> Partner:
        """Add a partner of the log by the log key of its home.pub."""
        from llmos.workflows import partners

        return partners.add(name, vkey, url, self.parts.who, self.parts)

    def remove_partner(self, name: str) -> None:
        """Remove a partner of the log."""
        from llmos.workflows import partners

        partners.remove(name, self.parts.who, self.parts)

    def partners(self) -> list[Partner]:
        """Return the partners of the log."""
        from llmos.workflows import partners

        self._kernel.monitor.authorize(self.parts.who, Action.READ_LOG, self._kernel.home)
        return partners.partners(self._kernel.store)

    def cosign(self) -> Cosigning:
        """Send the newest checkpoint to the partners and keep their cosignatures."""
        from llmos.workflows import cosign

        return cosign.run(self.parts.who, self.parts)

    def export(self, form: str, folder: str | Path) -> int:
        """Write the log as ocsf, jsonl or tiles into a new folder; return how many entries."""
        from llmos.transparency.log_export import ExportFormat
        from llmos.workflows import export_log

        try:
            wanted = ExportFormat(form)
        except ValueError:
            raise ConfigError(
                f"unknown format {form!r}", hint=f"one of: {', '.join(ExportFormat)}"
            ) from None
        return export_log.run(wanted, Path(folder), self.parts.who, self.parts).size

    def prove(self, index: int, path: Path) -> None:
        """Write a proof that an entry is in the log, for `llmos verify`."""
        from llmos.workflows import outputs, partners

        self._kernel.monitor.authorize(self.parts.who, Action.READ_LOG, self._kernel.home)
        outputs.write(path, rfc8785.dumps(partners.prove(index, self.parts).to_dict()))

    @property
    def _kernel(self) -> Kernel:
        return self.parts.kernel
