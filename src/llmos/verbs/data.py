"""The verbs on datasets and the people in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmos.data import erasures
from llmos.data.datasets import DatasetCard
from llmos.verbs.approvals import ApprovalVerbs
from llmos.workflows.parts import Parts


@dataclass(frozen=True, slots=True)
class DataVerbs:
    """What can be done with the datasets of a home and about one person in them."""

    parts: Parts

    def split(self, name: str, *, blocks: int) -> tuple[DatasetCard, ...]:
        """Make datasets of a dataset's people that share nobody; jobs on two do not add up."""
        from llmos.workflows import split_data

        return split_data.run(name, blocks, self.parts.who, self.parts)

    def erase(
        self, unit: str, *, reason: str, datasets: Sequence[str] = (), column: str | None = None
    ) -> dict[str, Any]:
        """Propose to erase a person from these datasets, or from all; another person decides."""
        from llmos.workflows import erase

        asked = erase.run(
            unit, reason, self.parts.who, self.parts, datasets=datasets, column=column
        )
        return ApprovalVerbs(self.parts).facts(asked.id)

    def receipt(self, approval_id: str, folder: str | Path | None = None) -> tuple[Path, Path]:
        """Write the signed receipt of an erasure and the public keys that verify it."""
        from llmos.workflows import shred

        return shred.receipt(approval_id, self.parts, None if folder is None else Path(folder))

    def finish_erasures(self) -> None:
        """Finish approved erasures that a crash or a restored backup has left unfinished."""
        with self.parts.kernel.store.read() as conn:
            if not erasures.keys(conn):
                return
        from llmos.workflows import shred

        shred.finish(self.parts)
