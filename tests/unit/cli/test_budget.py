from __future__ import annotations

import sqlite3
from pathlib import Path

from tests.unit.cli.conftest import Type


def test_a_ledger_that_differs_from_its_events_is_shown_as_such(typed: Type, home: Path) -> None:
    assert typed("budget", "show", "notes").status == 0
    conn = sqlite3.connect(home / "kernel.db")
    conn.execute("UPDATE budget_pools SET spent = 1 WHERE dataset = 'notes'")
    conn.commit()
    conn.close()
    shown = typed("budget", "show", "notes", "--json")
    assert (shown.status, shown.value["recomputed"]["agrees"]) == (10, False)
    assert "DIFFERENT" in typed("budget", "show", "notes").out
