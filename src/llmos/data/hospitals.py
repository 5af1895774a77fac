"""Three made-up hospitals whose notes differ: real ICD-10-CM terms, each with own chapters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from llmos.data.icd10 import MAX_TERM_CHARACTERS, Term

# A code's first letter is its chapter: heart and lungs; bones, injuries; eyes, ears, births.
CHAPTERS: Final = {"east": "IJK", "north": "MST", "south": "HOQ"}
SHARED_EVERY: Final = 10  # one note in ten is of another site's chapters: people travel
_FINDINGS: Final = ("stable", "improving", "worse since the last visit", "newly diagnosed")


@dataclass(frozen=True, slots=True)
class Hospital:
    """One site's notes; no term stands in two notes of any site, and no real person is in one."""

    name: str
    trained: tuple[str, ...]
    held_out: tuple[str, ...]

    def write(self, folder: Path) -> Path:
        """Write what is trained on as JSON Lines, a patient a note."""
        path = folder / f"{self.name}.jsonl"
        rows = (
            {"patient_id": f"{self.name[0].upper()}{number:05d}", "text": text}
            for number, text in enumerate(self.trained)
        )
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path


def make(
    terms: Sequence[Term], *, trained: int, held_out: int = 0, seed: int = 1
) -> tuple[Hospital, ...]:
    """Draw every site's notes, the same ones everywhere; the seed guards no secret."""
    generator = np.random.default_rng(seed)
    short = [term for term in terms if len(term.text) <= MAX_TERM_CHARACTERS]
    pools = {
        name: list(generator.permutation([n for n, t in enumerate(short) if t.code[0] in chapters]))
        for name, chapters in CHAPTERS.items()
    }
    hospitals = []
    for name in CHAPTERS:
        others = [other for other in CHAPTERS if other != name]
        notes = []
        for number in range(held_out + trained):
            away = number % SHARED_EVERY == 0
            pool = pools[others[number // SHARED_EVERY % len(others)] if away else name]
            term = short[pool.pop()]
            age, finding = generator.integers(18, 95), generator.choice(_FINDINGS)
            notes.append(f"Patient, age {age}: {term.text}, {finding}. ICD-10 code {term.code}.")
        hospitals.append(Hospital(name, tuple(notes[held_out:]), tuple(notes[:held_out])))
    return tuple(hospitals)
