"""The Python API as docs/python.md tells it: the block of that page is what runs here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.homes import checked_books, close, write_notes

import llmos
from llmos.errors import VerificationFailed

PAGE = Path(__file__).parents[2] / "docs/python.md"


def documented_block() -> str:
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return str(block)


@pytest.fixture(scope="module")
def story(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run the documented block once and return the names that it leaves."""
    folder = tmp_path_factory.mktemp("python-api")
    names: dict[str, Any] = {
        "home": folder / "home",
        "model": str(tiny_model_folder),
        "notes": write_notes(folder / "notes.jsonl"),
    }
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LLMOS_DEVICE", "cpu")
        environment.setenv("LLMOS_THREADS", "1")
        exec(compile(documented_block(), str(PAGE), "exec"), names)  # noqa: S102 - our own page
    yield names
    close(names["system"])


def test_the_documented_story_ends_with_a_certificate_that_verifies(story: Any) -> None:
    assert isinstance(story["system"], llmos.System)
    assert story["files"].certificate.parent == story["home"] / "reports"
    assert story["proven"]["model"] == story["trained"]["model"]
    assert 0 < story["proven"]["epsilon"] <= 3
    (report,) = story["leaks"].reports
    assert not report.failed


def test_after_the_documented_story_the_ledger_equals_its_events(story: Any) -> None:
    books = checked_books(story["system"])
    pool = story["pool"]
    assert books.pools == ((story["data"].name, pool.spent, 0),)  # nothing is held any more
    assert 0 < pool.spent < pool.cap


def test_a_certificate_changed_by_one_byte_does_not_verify(story: Any, tmp_path: Path) -> None:
    data = bytearray(story["files"].certificate.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "changed.json").write_bytes(data)
    with pytest.raises(VerificationFailed):
        llmos.verify(tmp_path / "changed.json", keys=story["files"].public_keys)
