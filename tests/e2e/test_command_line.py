"""The command line as a user types it: one story on a tiny model, each step once."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from tests.databases import copy_home
from tests.homes import books, close, run_llmos, write_notes

from llmos.cli import main
from llmos.cli.session import Session

OPTIONS = [
    "--data",
    "notes",
    "--model",
    "tiny",
    "--steps",
    "4",
    "--max-tokens",
    "32",
    "--rank",
    "4",
]


@dataclass(frozen=True)
class Said:
    """What a command said and how it ended."""

    status: int
    out: str
    err: str

    @property
    def value(self) -> Any:
        """Return the one JSON value that is all of standard output."""
        assert self.err == ""
        return json.loads(self.out)


Type = Callable[..., Said]


@pytest.fixture(scope="module", autouse=True)
def _small_machine() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LLMOS_DEVICE", "cpu")
        environment.setenv("LLMOS_THREADS", "1")
        yield


@contextmanager
def typing(home: Path) -> Iterator[Type]:
    """Yield the function that types a command in this process; a process of its own costs seconds.

    As in a process of its own, each command opens the home anew.
    """
    sessions: list[Session] = []

    def type_(*arguments: str) -> Said:
        sessions.append(Session(home=str(home)))
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
            status = main.run(list(arguments), sessions[-1])
        return Said(status, out.getvalue(), err.getvalue())

    yield type_
    for session in sessions:
        if session.opened is not None:
            close(session.opened)


def whole_batch(typed: Type) -> tuple[str, str]:
    """Return the option that draws all units in every step: the quickest to account for."""
    return "--batch", str(typed("data", "show", "notes", "--json").value["units"])


@pytest.fixture(scope="module")
def told(
    tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory, _small_machine: None
) -> Path:
    """Tell the beginning, from `init` to `report`; the home is only to be read."""
    folder = tmp_path_factory.mktemp("told")
    home, notes = folder / "home", write_notes(folder / "notes.jsonl")
    made = run_llmos(home, "init")
    assert (made.returncode, made.stderr) == (0, "")
    assert made.stdout.startswith("A new home:")
    assert "administrator  admin" in made.stdout
    columns = ("--unit", "patient_id", "--text", "text")
    budget = ("--epsilon", "8", "--delta", "1e-5")
    with typing(home) as typed:
        pulled = typed("model", "pull", str(tiny_model_folder))
        assert "Model tiny is ready:" in pulled.out
        imported = typed(
            *("data", "import", str(notes), *columns, *budget),
            *("--holdout", "0.25", "--canaries", "40"),
        )
        assert "Dataset notes is stored encrypted:" in imported.out
        options = (*OPTIONS, *whole_batch(typed), "--epsilon", "3", "--output", "coder")
        trained = run_llmos(home, "train", *options)
        assert (trained.returncode, trained.stderr) == (0, "")
        assert trained.stdout.startswith("Plan\n")
        assert "step 4/4" in trained.stdout
        assert "Next: llmos measure coder" in trained.stdout
        measured = typed("measure", "coder")
        assert "Next: llmos report coder" in measured.out
        reported = typed("report", "coder")
        assert "Next: llmos verify" in reported.out
    assert {said.status for said in (pulled, imported, measured, reported)} == {0}
    return home


@pytest.fixture
def home(told: Path, tmp_path: Path) -> Path:
    """Return a copy of the told home, to be changed."""
    return copy_home(told, tmp_path / "home")


@pytest.fixture
def typed(home: Path) -> Iterator[Type]:
    """Return the function that types a command for a home of its own."""
    with typing(home) as type_:
        yield type_


def test_the_told_home_holds_what_the_story_says(told: Path) -> None:
    kept = books(told)
    assert (kept.datasets, kept.models) == (("notes",), ("tiny", "coder"))
    assert [state for _, state in kept.jobs] == ["done"]
    assert stat.S_IMODE(told.stat().st_mode) == 0o700


def test_every_listing_has_the_same_content_for_people_and_for_programs(typed: Type) -> None:
    for command, name in (
        (("model", "ls"), "coder"),
        (("data", "ls"), "notes"),
        (("jobs", "ls"), "coder"),
        (("budget", "ls"), "notes"),
        (("user", "ls"), "admin"),
        (("log", "show"), "train-private"),
    ):
        for_people, for_programs = typed(*command), typed(*command, "--json")
        assert (for_people.status, for_programs.status) == (0, 0)
        assert name in for_people.out
        assert name in json.dumps(for_programs.value)


def test_show_tells_all_but_content(typed: Type) -> None:
    model = typed("model", "show", "coder", "--json").value
    data = typed("data", "show", "notes", "--json").value
    (job,) = typed("jobs", "ls", "--json").value
    facts = typed("jobs", "show", job["id"], "--json").value
    assert (model["kind"], model["base"]) == ("adapter", "tiny")
    assert data["canaries"] == 40
    assert (facts["state"], facts["reservation"]) == ("done", "committed, 4 steps done")
    for command in (("model", "show", "coder"), ("data", "show", "notes")):
        shown = typed(*command)
        assert shown.status == 0
        assert "asthma" not in shown.out
    assert job["id"] in typed("jobs", "show", job["id"]).out


def test_budget_says_what_was_spent_and_why(typed: Type) -> None:
    shown = typed("budget", "show", "notes", "--json").value
    assert shown["recomputed"]["agrees"]
    assert [r["state"] for r in shown["reservations"]] == ["committed"]
    assert shown["recomputed"]["spent"] == shown["reservations"][0]["cost"] > 0
    assert "equal to the balance" in typed("budget", "show", "notes").out
    explained = typed("budget", "explain", "notes", "--json").value
    assert explained["epsilon"] == 8
    assert "epsilon: 8" in typed("budget", "explain", "notes").out


def test_a_certificate_verifies_and_a_changed_copy_does_not(typed: Type, home: Path) -> None:
    files = typed("report", "coder", "--json").value
    proven = typed("verify", files["certificate"], "--json").value
    assert (proven["model"], proven["production"]) == ("coder", True)
    assert proven["epsilon"] <= 3
    data = bytearray(Path(files["certificate"]).read_bytes())
    data[len(data) // 2] ^= 1
    changed = home / "reports/changed.json"
    changed.write_bytes(data)
    refused = typed("verify", str(changed))
    assert (refused.status, refused.out) == (10, "")
    assert refused.err.startswith("llmos: error: ")
    without_keys = typed("verify", files["certificate"], "--key", str(home / "nothing.pub"))
    assert without_keys.status == 10
    assert "llmos: hint: name the home's public key file with --key" in without_keys.err


def test_a_certificate_verifies_in_a_process_that_has_no_home(told: Path, tmp_path: Path) -> None:
    done = run_llmos(
        tmp_path / "nowhere",
        *("verify", str(told / "reports/coder.certificate.json")),
        *("--key", str(told / "home.pub")),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "verified" in done.stdout
    assert not (tmp_path / "nowhere").exists()


def test_measure_says_the_same_to_programs(typed: Type) -> None:
    measured = typed("measure", "coder", "--json")
    assert measured.status == 0
    (report,) = measured.value["reports"]
    assert (report["subject"]["model"], report["verdict"]) == ("coder", "pass")


def test_a_plan_is_free_and_too_large_an_epsilon_is_refused(typed: Type, home: Path) -> None:
    before = books(home)
    options = (*OPTIONS, *whole_batch(typed))
    plan = typed("train", *options, "--epsilon", "1", "--plan", "--json")
    assert plan.status == 0
    assert plan.value["steps"] == 4
    assert typed("train", *options, "--epsilon", "1", "--plan").out.startswith("Plan\n")
    refused = typed("train", *options, "--epsilon", "100")
    assert refused.status == 6
    assert "llmos: hint: " in refused.err
    sensitive = typed("train", *options, "--no-privacy")
    assert sensitive.status == 5
    assert books(home) == before


def test_an_exported_adapter_lies_in_the_clear_in_a_new_folder(typed: Type, home: Path) -> None:
    folder = home.parent / "exported"
    written = typed("model", "export", "coder", str(folder), "--json").value
    assert sorted(written["files"]) == sorted(path.name for path in folder.iterdir())
    assert "adapter_model.safetensors" in written["files"]
    assert typed("model", "export", "coder", str(folder)).status == 12
    assert typed("model", "export", "tiny", str(home.parent / "tiny")).status == 8


def test_a_key_is_shown_once_listed_without_its_secret_and_revoked(typed: Type) -> None:
    made = typed("key", "create", "--label", "[/ward] :key:", "--model", "coder", "--json").value
    listed = typed("key", "ls")
    assert made["id"] in listed.out
    assert made["token"] not in listed.out
    (row,) = typed("key", "ls", "--json").value
    assert (row["models"], row["label"], row["revoked_at"]) == (["coder"], "[/ward] :key:", None)
    assert typed("key", "revoke", made["id"]).status == 0
    (row,) = typed("key", "ls", "--json").value
    assert row["revoked_at"] is not None
    for_people = typed("key", "create")
    assert for_people.out.startswith("llmos_")
    assert len(for_people.out.splitlines()) == 1
    assert "only time" in for_people.err
    assert typed("key", "revoke", "nothing").status == 4
    assert typed("key", "create", "--model", "nothing").status == 8


def test_policy_decides_by_role(typed: Type) -> None:
    assert typed("user", "add", "ada", "--role", "auditor", "--json").value == {
        "name": "ada",
        "kind": "person",
        "roles": ["auditor"],
        "tenant": None,
    }
    assert typed("user", "add", "ada", "--role", "auditor").status == 4
    denied = typed("policy", "test", "ada", "train-private", "--data", "notes", "--json")
    assert (denied.status, denied.value["allowed"]) == (5, False)
    assert typed("policy", "test", "admin", "train-private", "--data", "notes").status == 0
    assert typed("policy", "test", "admin", "fly").status == 3
    assert typed("policy", "check", "--json").value["valid"]
    assert "permit" in typed("policy", "show").out


def test_an_invalid_draft_is_named_and_never_proposed(typed: Type, home: Path) -> None:
    draft = home / "policy/mine.cedar"
    draft.write_text("permit (principal, action, resource) when { 1 };")
    assert "mine.cedar, line 1" in typed("policy", "check").err
    assert typed("policy", "apply", "--reason", "a slip").status == 4
    assert typed("data", "ls").status == 0  # what is in force stays in force
    draft.unlink()


def test_a_log_entry_is_proven_offline(typed: Type, home: Path) -> None:
    size = typed("log", "verify", "--json").value["entries"]
    proof = home.parent / "proof.json"
    assert typed("log", "prove", "0", str(proof), "--json").value["index"] == 0
    proven = typed("verify", str(proof), "--key", str(home / "home.pub"), "--json").value
    assert (proven["log_index"], proven["log_size"]) == (0, size)
    other = typed("log", "prove", str(size), str(proof))
    assert (other.status, other.out) == (2, "")
    newest = typed("log", "show", "--after", str(size - 2), "--json").value
    assert [entry["index"] for entry in newest] == [size - 1]


def test_doctor_finds_nothing_wrong_until_others_can_enter_the_home(
    typed: Type, home: Path
) -> None:
    findings = {f["name"]: f for f in typed("doctor", "--json").value}
    assert findings["home"]["ok"]
    assert "ledger equals its events" in findings["home"]["detail"]
    home.chmod(0o755)
    sick = typed("doctor")
    assert sick.status == 1
    assert "BAD  home: " in sick.out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("model", "show", "nothing"), 8, "no model"),
        (("data", "show", "nothing"), 7, "no dataset"),
        (("jobs", "show", "nothing"), 11, "no job"),
        (("budget", "explain", "nothing"), 7, ""),
        (("measure", "nothing"), 8, "no model"),
        (("report", "tiny"), 8, "base model"),
        (("jobs", "resume", "nothing"), 11, "no job"),
        (("jobs", "cancel", "nothing"), 11, "no job"),
        (("init",), 12, "exists and is not empty"),
        (("user", "add", "x", "--role", "king"), 2, "king"),
    ],
)
def test_each_refusal_has_its_status_and_stays_off_standard_output(
    typed: Type, arguments: tuple[str, ...], status: int, message: str
) -> None:
    said = typed(*arguments)
    assert (said.status, said.out) == (status, "")
    assert said.err.startswith("llmos: error: ")
    assert message in said.err


def test_a_home_with_a_passphrase_opens_with_that_passphrase_only(tmp_path: Path) -> None:
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.write_text("correct horse battery\n")
    wrong.write_text("incorrect horse\n")
    home = tmp_path / "home"
    made = run_llmos(home, "init", "--passphrase", LLMOS_PASSPHRASE_FILE=str(right))
    assert (made.returncode, made.stderr) == (0, "")
    assert not (home / "root.key").exists()
    assert run_llmos(home, "data", "ls", LLMOS_PASSPHRASE_FILE=str(right)).returncode == 0
    refused = run_llmos(home, "data", "ls", LLMOS_PASSPHRASE_FILE=str(wrong))
    assert (refused.returncode, refused.stdout) == (4, "")
    assert "correct horse" not in refused.stderr
    assert refused.stderr.startswith("llmos: error: ")


def test_commands_before_init_say_how_to_make_a_home(tmp_path: Path) -> None:
    with typing(tmp_path / "none") as typed:
        for command in (("data", "ls"), ("policy", "show"), ("policy", "check"), ("serve",)):
            said = typed(*command)
            assert (said.status, said.out) == (12, ""), command
            assert "init" in said.err
        assert "llmos init makes one" in typed("doctor").out
