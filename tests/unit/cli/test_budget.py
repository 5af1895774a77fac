from __future__ import annotations

from pathlib import Path

from tests.databases import outside
from tests.unit.cli.conftest import Type


def test_a_ledger_that_differs_from_its_events_is_shown_as_such(typed: Type, home: Path) -> None:
    assert typed("budget", "show", "notes").status == 0
    with outside(home) as conn:
        conn.exec_driver_sql(
            "INSERT INTO budget_events"
            " (pool, kind, reference, cap_change, held_change, spent_change, at)"
            " VALUES ('notes', 'reserve', 'nobody', 0, 1, 0, '')"
        )
    shown = typed("budget", "show", "notes", "--json")
    assert (shown.status, shown.value["recomputed"]["agrees"]) == (10, False)
    assert "DIFFERENT" in typed("budget", "show", "notes").out
