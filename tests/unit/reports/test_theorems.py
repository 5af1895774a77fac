from __future__ import annotations

from llmos.reports.theorems import THEOREMS


def test_every_theorem_names_its_paper() -> None:
    assert set(THEOREMS) == {"pld", "renyi", "conversion", "filter", "parallel", "concurrency"}
    assert all("arXiv:" in text for text in THEOREMS.values())
