"""Raising a budget takes two people; whatever is refused leaves the pool as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.homes import Person, hire, last_records, opened

from llmos.errors import (
    ApprovalConflict,
    AuthenticationError,
    ConfigError,
    InvalidPrivacyParameter,
    PermissionDenied,
    UnknownApproval,
    UnknownDataset,
)
from llmos.system import System


@pytest.fixture
def bob(home: Path, tmp_path: Path) -> Person:
    return hire(home, "bob", "steward", tmp_path)


def test_two_people_raise_a_budget(home: Path, bob: Person) -> None:
    with opened(home) as system:
        before = system.kernel.budget.pool("notes")
        asked = system.budgets.propose_raise(
            "notes", epsilon=before.epsilon + 2, reason="new study"
        )
        assert system.kernel.budget.pool("notes") == before
    with bob.at_work() as system:
        assert system.who.name == "bob"
        decided = system.approvals.decide(asked.id, approve=True)
        assert (decided["proposer"], decided["decider"]) == ("admin", "bob")
        after = system.kernel.budget.pool("notes")
        assert after.epsilon == before.epsilon + 2
        assert after.cap > before.cap
        assert system.kernel.budget.recompute("notes") == after.balance
        (record,) = last_records(system, 1)
        assert (record["action"], record["outcome"], record["actor"]) == ("approve", "done", "bob")
        assert record["details"]["request"]["epsilon"] == after.epsilon


def test_a_refused_proposal_changes_nothing(home: Path, bob: Person) -> None:
    with opened(home) as system:
        before = system.kernel.budget.pool("notes")
        asked = system.budgets.propose_raise("notes", epsilon=99.0, reason="more")
    with bob.at_work() as system:
        assert system.approvals.decide(asked.id, approve=False)["state"] == "refused"
        assert system.kernel.budget.pool("notes") == before
        with pytest.raises(ApprovalConflict):
            system.approvals.decide(asked.id, approve=True)
        assert system.kernel.budget.pool("notes") == before


def test_one_person_cannot_do_it_alone(home: Path, bob: Person) -> None:
    with bob.at_work() as system:
        before = system.kernel.budget.pool("notes")
        asked = system.budgets.propose_raise("notes", epsilon=99.0, reason="more")
        with pytest.raises(ApprovalConflict, match="another person"):
            system.approvals.decide(asked.id, approve=True)
    with opened(home) as system:  # named by the configuration, no key shown
        with pytest.raises(ApprovalConflict, match="API key"):
            system.approvals.decide(asked.id, approve=True)
        assert system.kernel.budget.pool("notes") == before
        assert system.approvals.facts(asked.id)["state"] == "open"
        (record,) = last_records(system, 1)
        assert record["outcome"] == "failed"


def test_an_act_that_fails_leaves_the_approval_open(home: Path, bob: Person) -> None:
    with opened(home) as system:
        epsilon = system.kernel.budget.pool("notes").epsilon
        small = system.budgets.propose_raise("notes", epsilon=epsilon + 1, reason="a little")
        large = system.budgets.propose_raise("notes", epsilon=epsilon + 2, reason="a lot")
    with bob.at_work() as system:
        system.approvals.decide(large.id, approve=True)
        raised = system.kernel.budget.pool("notes")
        with pytest.raises(InvalidPrivacyParameter):  # it has more than that by now
            system.approvals.decide(small.id, approve=True)
        assert system.approvals.facts(small.id)["state"] == "open"
        assert system.kernel.budget.pool("notes") == raised


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("nan"), float("inf"), 1.0])
def test_a_proposal_must_be_an_increase(system: System, epsilon: float) -> None:
    with pytest.raises(InvalidPrivacyParameter):
        system.budgets.propose_raise("notes", epsilon=epsilon, reason="more")
    assert system.approvals.overview() == []


def test_unknown_pools_and_proposals(home: Path, bob: Person) -> None:
    with bob.at_work() as system:
        with pytest.raises(UnknownDataset):
            system.budgets.propose_raise("nobody", epsilon=99.0, reason="more")
        with pytest.raises(UnknownApproval):
            system.approvals.decide("approval-0", approve=True)


def test_policy_says_who_may_propose_and_decide(home: Path, tmp_path: Path) -> None:
    engineer = hire(home, "eve", "engineer", tmp_path)
    with engineer.at_work() as system, pytest.raises(PermissionDenied):
        system.budgets.propose_raise("notes", epsilon=99.0, reason="more")
    with opened(home) as system:
        asked = system.budgets.propose_raise("notes", epsilon=99.0, reason="more")
    with engineer.at_work() as system:
        with pytest.raises(PermissionDenied):
            system.approvals.decide(asked.id, approve=True)
        assert system.approvals.facts(asked.id)["state"] == "open"


def test_a_key_file_must_hold_a_good_key(home: Path, bob: Person, tmp_path: Path) -> None:
    for content, error in (("llmos_nonsense", AuthenticationError), ("", ConfigError)):
        file = tmp_path / "wrong.key"
        file.write_text(content)
        file.chmod(0o600)
        with opened(home, api_key_file=file) as system, pytest.raises(error):
            _ = system.who
