"""Where a model's leak report is kept."""

from __future__ import annotations

from pathlib import Path


def report_path(home: Path, model: str) -> Path:
    """Return where a model's leak report is kept."""
    return home / "reports" / f"{model}.leak.json"
