"""The threat model names only tests that exist, numbers its risks and is found by people."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "THREAT_MODEL.md").read_text()
NAMED = sorted(set(re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", TEXT)))


@pytest.mark.parametrize(("file", "test"), NAMED, ids=lambda part: part or "all")
def test_every_test_that_it_names_exists(file: str, test: str) -> None:
    source = (ROOT / file).read_text()
    assert "def test_" in source
    if test:
        assert f"def {test}(" in source


def test_it_names_tests_at_every_boundary() -> None:
    boundaries = re.split(r"^### ", TEXT, flags=re.MULTILINE)[1:]
    assert [part.split()[0] for part in boundaries] == [f"B{n}" for n in range(1, 12)]
    assert all(re.search(r"tests/[\w/]+\.py", part) for part in boundaries)


def test_residual_risks_are_numbered_once_and_every_reference_leads_to_one() -> None:
    defined = re.findall(r"^\| (R\d+) \|", TEXT, flags=re.MULTILINE)
    assert defined == [f"R{number}" for number in range(1, len(defined) + 1)]
    assert set(re.findall(r"\bR\d+\b", TEXT)) == set(defined)


@pytest.mark.parametrize("document", ["SECURITY.md", "README.md", "README.zh-CN.md"])
def test_people_find_it(document: str) -> None:
    assert "(THREAT_MODEL.md)" in (ROOT / document).read_text()


def test_each_source_file_that_it_names_exists() -> None:
    for path in re.findall(r"`(src/[\w/]+\.py)`", TEXT):
        assert (ROOT / path).is_file()
