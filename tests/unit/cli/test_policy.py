from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit.cli.conftest import Type

from llmos.kernel.policy import DEFAULTS, Policy


def test_the_policies_in_force_are_shown_not_the_drafts(typed: Type, home: Path) -> None:
    (home / "policy/mine.cedar").write_text("// a draft")
    assert "a draft" not in typed("policy", "show").out
    shown = typed("policy", "show", "--json").value
    assert shown["digest"] == Policy.load(DEFAULTS).digest
    assert "entity Principal" in typed("policy", "schema").out


def test_a_draft_is_checked_and_proposed(
    typed: Type, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert typed("policy", "check", "--json").value["in_force"] is True
    draft = home / "policy/mine.cedar"
    draft.write_text("permit (principal, action, resource)\nwhen { 1 };")
    for place in ((), (str(draft),), (str(home / "policy"),)):
        wrong = typed("policy", "check", *place)
        assert (wrong.status, f"{draft}, line 1: " in wrong.err) == (4, True)
    assert typed("policy", "apply", "--reason", "x").status == 4
    draft.write_text("// nothing more")
    told = typed("policy", "check")
    assert "llmos policy apply" in told.err
    assert typed("policy", "check", str(draft.parent)).err == ""
    typed("user", "add", "bob", "--role", "steward")
    made = typed("key", "create", "--user", "bob", "--json").value
    asked = typed("policy", "apply", "--reason", "a comment", "--json").value
    assert "approval approve" in typed("policy", "apply", "--reason", "again").out
    key = tmp_path / "bob.key"
    key.write_text(made["token"])
    key.chmod(0o600)
    monkeypatch.setenv("LLMOS_API_KEY_FILE", str(key))
    assert typed("approval", "approve", asked["id"]).status == 0
    assert typed("policy", "check", "--json").value["in_force"] is True


def test_a_decision_is_tested_and_explained(typed: Type) -> None:
    typed("user", "add", "ada", "--role", "developer")
    ask = ("ada", "train-private", "--data", "ward")
    assert typed("policy", "test", *ask).status == 5
    assert typed("policy", "test", "admin", "train-private", "--data", "ward").status == 0
    explained = typed("policy", "explain", *ask, "--json").value
    assert explained["would_allow"] == ["the role administrator", "the role engineer"]
    assert "the role engineer" in typed("policy", "explain", *ask).out
    never = typed("policy", "explain", "admin", "train-without-privacy", "--data", "ward").out
    assert "no-training-without-privacy-on-sensitive-data" in never
    assert "forbid (" in never
    assert "No other role" in never
    allowed = typed("policy", "explain", "ada", "chat", "--model", "tiny").out
    assert "developer-uses-models" in allowed
    assert typed("policy", "explain", "ada", "fly").status == 3
    assert typed("policy", "test", "admin", "login", "--json").value["allowed"]
