from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit.cli.conftest import Type


@pytest.fixture
def bobs_key(typed: Type, tmp_path: Path) -> Path:
    """Add Bob and keep his API key in a file."""
    assert typed("user", "add", "bob", "--role", "steward").status == 0
    made = typed("key", "create", "--user", "bob", "--json").value
    file = tmp_path / "bob.key"
    file.write_text(made["token"])
    file.chmod(0o600)
    return file


def epsilon_of_notes(typed: Type) -> float:
    pools = {pool["pool"]: pool for pool in typed("budget", "ls", "--json").value}
    return float(pools["notes"]["epsilon"])


def test_a_budget_is_raised_by_two_people(
    typed: Type, bobs_key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised = typed("budget", "raise", "notes", "--epsilon", "50", "--reason", "new study")
    assert "waits for someone else's decision" in raised.out
    (asked,) = typed("approval", "ls", "--json").value
    assert "new study" in typed("approval", "ls").out
    alone = typed("approval", "approve", asked["id"])
    assert (alone.status, "another person" in alone.err) == (4, True)
    monkeypatch.setenv("LLMOS_API_KEY_FILE", str(bobs_key))
    assert "approved" in typed("approval", "approve", asked["id"]).out
    shown = typed("approval", "show", asked["id"], "--json").value
    assert (shown["proposer"], shown["decider"], shown["state"]) == ("admin", "bob", "approved")
    assert shown["record"]["payloadType"] == "application/vnd.llmos.approval+json"
    assert "decider" in typed("approval", "show", asked["id"]).out
    assert epsilon_of_notes(typed) == 50


def test_a_proposal_is_refused(
    typed: Type, bobs_key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = typed(
        "budget", "raise", "notes", "--epsilon", "50", "--reason", "new study", "--json"
    ).value
    monkeypatch.setenv("LLMOS_API_KEY_FILE", str(bobs_key))
    assert typed("approval", "refuse", asked["id"], "--json").value["state"] == "refused"
    assert epsilon_of_notes(typed) < 50


def test_what_if_says_the_price_and_whether_it_would_be_admitted(typed: Type) -> None:
    job = ("budget", "what-if", "notes", "--steps", "8", "--batch", "24", "--epsilon")
    assert "notes" in typed(*job, "3").out
    assert typed(*job, "3", "--json").value["admitted"] is True
    refused = typed(*job, "500")
    assert (refused.status, "this would fit: epsilon" in refused.out) == (6, True)
    too_much = typed(*job, "500", "--json")
    assert (too_much.status, too_much.value["admitted"]) == (6, False)
