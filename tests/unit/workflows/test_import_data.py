from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from llmos.config import load
from llmos.data.datasets import Datasets
from llmos.data.importers import Columns
from llmos.errors import (
    DataError,
    DatasetExists,
    InvalidPrivacyParameter,
    LlmosError,
    MalformedRecord,
)
from llmos.jobs.jobs import Jobs
from llmos.kernel import kernel as kernels
from llmos.kernel import schema
from llmos.models.registry import Registry
from llmos.privacy import Classification
from llmos.workflows import import_data
from llmos.workflows.parts import Parts

GOOD = "".join(json.dumps({"patient": f"p{n}", "note": f"text {n}"}) + "\n" for n in range(30))
OPTIONS: dict[str, Any] = {
    "name": "ward-7",
    "unit": "patient",
    "text": "note",
    "classification": "sensitive",
    "purposes": ("training",),
    "epsilon": 8.0,
    "delta": 1e-6,
    "holdout_fraction": 0.3,
    "canaries": 10,
}


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    kernel = kernels.create(load(home=tmp_path / "home"))
    datasets = Datasets(kernel.store, kernel.vault, kernel.monitor)
    registry = Registry(kernel.store, kernel.vault, kernel.config.home)
    return Parts(kernel, datasets, registry, Jobs(kernel.store, kernel.config.home))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "Ward 7 (2024).jsonl"
    path.write_text(GOOD)
    return path


def start(parts: Parts, path: Path, **changes: Any) -> str:
    request = import_data.request(path, **(OPTIONS | changes))
    return import_data.run(request, parts.kernel.principal(), parts).name


def state(parts: Parts) -> tuple[int, int, int, int]:
    """Count datasets, pools, log entries and files of the vault; check the whole log."""
    parts.kernel.auditlog.verify()
    with parts.kernel.store.read() as conn:
        tables = (schema.datasets, schema.budget_pools, schema.log_entries)
        counts = [
            conn.execute(select(func.count()).select_from(table)).scalar_one() for table in tables
        ]
    objects = parts.kernel.config.home.glob("objects/**/*")
    return counts[0], counts[1], counts[2], sum(path.is_file() for path in objects)


def test_a_file_becomes_a_dataset(parts: Parts, file: Path) -> None:
    before = state(parts)
    assert start(parts, file) == "ward-7"
    assert state(parts) == (1, 1, before[2] + 1, 3)
    card = parts.datasets.card("ward-7")
    assert card.units + card.holdout_units >= 30
    assert (card.canaries, card.unit_column) == (10, "patient")
    assert file.read_text() == GOOD  # the original is left alone


def test_the_request_that_people_type(file: Path) -> None:
    request = import_data.request(file, **(OPTIONS | {"name": None}))
    assert request.name == "ward-7-2024"
    assert request.columns == Columns(unit="patient", completion="note")
    assert request.classification is Classification.SENSITIVE
    pair = import_data.request(
        file, **(OPTIONS | {"text": None, "prompt": "note", "completion": "code"})
    )
    assert pair.columns == Columns(unit="patient", prompt="note", completion="code")


@pytest.mark.parametrize(
    "changes",
    [
        {"text": None},
        {"prompt": "note"},
        {"completion": "code"},
        {"text": None, "prompt": "note"},
        {"text": None, "completion": "code"},
        {"text": "patient"},
        {"classification": "secret"},
    ],
)
def test_a_request_that_is_not_clear(changes: dict[str, Any], file: Path) -> None:
    with pytest.raises(DataError) as caught:
        import_data.request(file, **(OPTIONS | changes))
    assert caught.value.hint


def assert_refused(parts: Parts, path: Path, error: type[LlmosError], **changes: Any) -> LlmosError:
    """Import, expect the error, and find the home as it was."""
    before = state(parts)
    with pytest.raises(error) as caught:
        start(parts, path, **changes)
    assert state(parts) == before
    return caught.value


@pytest.mark.parametrize(
    "changes",
    [
        {"epsilon": 0.0}, {"epsilon": -1.0}, {"epsilon": math.nan}, {"epsilon": math.inf},
        {"delta": 0.0}, {"delta": 1.0}, {"delta": math.nan},
    ],
)  # fmt: skip
def test_privacy_parameters_are_checked_before_the_file_is_opened(
    changes: dict[str, Any], parts: Parts, tmp_path: Path
) -> None:
    assert_refused(parts, tmp_path / "nowhere.jsonl", InvalidPrivacyParameter, **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": "Ward 7"}, "dataset name"),
        ({"purposes": ()}, "no purpose"),
        ({"holdout_fraction": 1.0}, "held-out fraction"),
        ({"canaries": -1}, "number of canaries"),
        ({"canary_template": "no name"}, "template"),
        ({"unit": "person"}, "no column 'person'"),
        ({"text": "letter"}, "no column 'letter'"),
    ],
)
def test_other_bad_options_leave_the_home_as_it_was(
    changes: dict[str, Any], reason: str, parts: Parts, file: Path
) -> None:
    assert reason in str(assert_refused(parts, file, DataError, **changes))


@pytest.mark.parametrize(
    "line",
    [
        b"{broken",
        b'{"patient": null, "note": "a"}',
        b'{"patient": "", "note": "a"}',
        b'{"patient": "p1", "note": ""}',
        b'{"patient": "p1"}',
        b'{"patient": "p1", "note": "\xff"}',
        b'["p1", "a"]',
    ],
)
def test_one_bad_line_among_good_ones_leaves_the_home_as_it_was(
    line: bytes, parts: Parts, file: Path
) -> None:
    file.write_bytes(GOOD.encode() + line + b"\n" + GOOD.encode())
    error = assert_refused(parts, file, MalformedRecord)
    assert isinstance(error, MalformedRecord)
    assert error.line == 31
    assert "nothing was imported" in error.message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b""),
        ("a.csv", b"patient,note\n"),
        ("a.csv", b"patient,note,note\np1,a,b\n"),
        ("a.csv", b"patient,note\np1\n"),
        ("a.parquet", b"no parquet"),
        ("a.txt", b"p1 a"),
    ],
)
def test_a_file_that_cannot_be_read_leaves_the_home_as_it_was(
    name: str, content: bytes, parts: Parts, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert_refused(parts, path, DataError)


def test_a_file_that_is_not_there(parts: Parts, tmp_path: Path) -> None:
    assert_refused(parts, tmp_path / "nowhere.jsonl", DataError)


def test_a_name_that_is_taken(parts: Parts, file: Path) -> None:
    start(parts, file)
    assert_refused(parts, file, DatasetExists)
