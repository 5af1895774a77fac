"""`llmos data import`: what it refuses, with which status, and that nothing is left of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.homes import books, write_notes
from tests.unit.cli.conftest import Type

GOOD = [json.dumps({"patient_id": f"p{n}", "text": f"text {n}"}) for n in range(5)]
TERMS = ["--unit", "patient_id", "--text", "text"]
BUDGET = ["--epsilon", "8", "--delta", "1e-5"]


@pytest.mark.parametrize(
    ("lines", "options", "status", "said"),
    [
        (GOOD, ["--unit", "person", "--text", "text", *BUDGET], 7, "no column 'person'"),
        (GOOD, ["--unit", "patient_id", "--text", "note", *BUDGET], 7, "no column 'note'"),
        (GOOD, ["--unit", "patient_id", *BUDGET], 7, "is not clear"),
        ([*GOOD, '{"patient_id": null, "text": "a"}'], [*TERMS, *BUDGET], 7, "line 6: unit"),
        ([*GOOD, '{"patient_id": "", "text": "a"}'], [*TERMS, *BUDGET], 7, "line 6"),
        ([*GOOD, "{broken", *GOOD], [*TERMS, *BUDGET], 7, "line 6"),
        ([*GOOD, '["p1"]'], [*TERMS, *BUDGET], 7, "line 6"),
        ([], [*TERMS, *BUDGET], 7, "holds no records"),
        (GOOD, [*TERMS, "--epsilon", "0", "--delta", "1e-5"], 6, "epsilon must be"),
        (GOOD, [*TERMS, "--epsilon", "-1", "--delta", "1e-5"], 6, "epsilon must be"),
        (GOOD, [*TERMS, "--epsilon", "nan", "--delta", "1e-5"], 6, "epsilon must be"),
        (GOOD, [*TERMS, "--epsilon", "inf", "--delta", "1e-5"], 6, "epsilon must be"),
        (GOOD, [*TERMS, "--epsilon", "8", "--delta", "1"], 6, "delta must be"),
        (GOOD, [*TERMS, "--epsilon", "8", "--delta", "0"], 6, "delta must be"),
        (GOOD, [*TERMS, "--epsilon", "8", "--delta", "nan"], 6, "delta must be"),
        (GOOD, [*TERMS, *BUDGET, "--derived-from", "nobody"], 7, "no dataset 'nobody'"),
        (GOOD, [*TERMS, *BUDGET, "--purpose-epsilon", "research=1"], 7, "no purpose"),
        (GOOD, [*TERMS, *BUDGET, "--purpose-epsilon", "training=9"], 6, "at most 8"),
        (GOOD, [*TERMS, *BUDGET, "--purpose-epsilon", "training"], 2, "is not NAME=EPSILON"),
        (GOOD, [*TERMS, *BUDGET, "--name", "notes"], 7, "already"),
        (GOOD, [*TERMS, *BUDGET, "--name", "../x"], 7, "cannot be a dataset name"),
        (GOOD, [*TERMS, *BUDGET, "--holdout", "1"], 7, "held-out"),
        (GOOD, [*TERMS, *BUDGET, "--canaries", "-1"], 7, "canaries"),
        (GOOD, [*TERMS, *BUDGET, "--purpose", "Any Thing"], 7, "a purpose"),
        (GOOD, TERMS, 2, "--epsilon"),
        (GOOD, [*TERMS, *BUDGET, "--classification", "secret"], 2, "secret"),
    ],
)
def test_a_refused_import_leaves_the_home_as_it_was(
    lines: list[str],
    options: list[str],
    status: int,
    said: str,
    typed: Type,
    home: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "new.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    before = books(home)
    refused = typed("data", "import", str(path), *options)
    assert (refused.status, refused.out) == (status, "")
    assert refused.err.startswith("llmos: error: ")
    assert said in refused.err
    assert books(home) == before
    for_programs = typed("data", "import", str(path), *options, "--json")
    assert for_programs.status == status
    if status != 2:
        assert said in for_programs.value["error"]["message"]
    assert books(home) == before


def test_a_file_that_is_not_there_or_of_an_unknown_kind(
    typed: Type, home: Path, tmp_path: Path
) -> None:
    before = books(home)
    (tmp_path / "notes.txt").write_text("p1 a\n")
    for name in ("nothing.jsonl", "notes.txt", "."):
        refused = typed("data", "import", str(tmp_path / name), *TERMS, *BUDGET)
        assert refused.status == 7
        assert refused.err.startswith("llmos: error: ")
    assert books(home) == before


def test_an_import_says_what_it_stored(typed: Type, tmp_path: Path) -> None:
    path = write_notes(tmp_path / "Ward 7.jsonl", units=9)
    options = [*TERMS, *BUDGET, "--holdout", "0", "--canaries", "3", "--purpose", "research"]
    card = typed("data", "import", str(path), *options, "--json").value
    assert (card["name"], card["purposes"], card["canaries"]) == ("ward-7", ["research"], 3)
    assert card["classification"] == "sensitive"  # when nothing else is said
    shown = typed("data", "import", str(path), *options, "--name", "again")
    assert "Dataset again is stored encrypted" in shown.out
    assert "per patient_id" in shown.out
    assert "is logged" in shown.out


def test_jobs_on_derived_data_are_charged_to_every_pool(typed: Type, tmp_path: Path) -> None:
    path = write_notes(tmp_path / "summaries.jsonl")
    options = [*TERMS, *BUDGET, "--holdout", "0", "--derived-from", "notes"]
    card = typed(
        "data", "import", str(path), *options, "--purpose-epsilon", "training=5", "--json"
    ).value
    assert card["parents"] == ["notes"]
    priced = typed(
        "budget",
        "what-if",
        "summaries",
        "--epsilon",
        "2",
        "--steps",
        "8",
        "--batch",
        "24",
        "--json",
    ).value
    charged = [pool["pool"] for pool in priced["pools"]]
    assert charged == ["summaries", "notes", "summaries/training"]
    plan = typed(
        "train", "--data", "summaries", "--model", "tiny", "--epsilon", "2", "--steps", "8",
        "--batch", "24", "--plan",
    ).out  # fmt: skip
    assert all(f"of {pool}'s" in plan for pool in charged)


def test_a_dataset_is_split_into_blocks(typed: Type, tmp_path: Path) -> None:
    path = write_notes(tmp_path / "clinic.jsonl", units=40)
    parts = ["--tenant-epsilon", "ward=4", "--tenant-epsilon", "ward/training=1"]
    typed("data", "import", str(path), *TERMS, *BUDGET, *parts)
    said = typed("data", "split", "clinic", "--blocks", "2")
    assert said.status == 0
    assert "clinic-2" in said.out
    assert said.out.endswith("Each has the budget of clinic: llmos budget ls\n")
    first, second = typed("data", "split", "clinic", "--blocks", "2", "--json").value
    assert first["block"] == {"of": "clinic", "number": 1, "blocks": 2}
    assert (
        first["units"] + second["units"] == typed("data", "show", "clinic", "--json").value["units"]
    )
    pools = {pool["pool"]: pool for pool in typed("budget", "ls", "--json").value}
    of_blocks = {f"clinic-{n}{part}" for n in (1, 2) for part in ("", "@ward", "/training@ward")}
    assert of_blocks <= set(pools)
    assert pools["clinic-1/training@ward"]["epsilon"] == 1
    assert "McSherry" in typed("budget", "explain", "clinic-1").out
    assert typed("data", "split", "clinic", "--blocks", "3").status == 6
