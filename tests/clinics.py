"""A home whose datasets `clinic` and `study` hold the same patients, one of them to be erased."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.homes import Person, opened

from llmos.data.records import Record
from llmos.kernel.policy import Action
from llmos.system import System

PERSON = "Zoë Zanzibar-4711"  # stands nowhere but in the records


def write_clinic(path: Path, people: int = 12) -> Path:
    """Write two notes of each patient; the first one is the person to erase."""
    units = [PERSON, *(f"patient-{n}" for n in range(1, people))]
    rows = [{"patient_id": u, "text": f"note {n}: asthma"} for n in range(2) for u in units]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def import_clinic(home: Path, folder: Path) -> None:
    """Import the patients' notes twice."""
    notes = write_clinic(folder / "clinic.jsonl")
    with opened(home) as system:
        for name in ("clinic", "study"):
            system.import_data(
                notes,
                name=name,
                unit="patient_id",
                text="text",
                classification="synthetic",
                epsilon=8,
                delta=1e-5,
                holdout=0,
            )


def propose(home: Path, *datasets: str) -> str:
    """Propose to erase the person and return the approval's id."""
    with opened(home) as system:
        asked = system.data.erase(PERSON, reason="request 17", datasets=datasets)
        return str(asked["id"])


def erased(home: Path, bob: Person, *datasets: str) -> dict[str, Any]:
    """Erase the person and return the decided approval."""
    approval = propose(home, *datasets)
    with bob.at_work() as system:
        return system.approvals.decide(approval, approve=True)


def read(system: System, dataset: str) -> list[Record]:
    """Read a dataset's training records through the monitor."""
    card = system.datasets.card(dataset)
    with system.kernel.monitor.admit(
        system.who,
        Action.READ_DATA,
        card.resource,
        key="read",
        objects={card.object_id},
        charge=None,
    ) as grant:
        return list(system.datasets.open_records(card, grant))


def units(records: Iterable[Record]) -> set[str]:
    """Return whose records these are."""
    return {record.unit for record in records}
