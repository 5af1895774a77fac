"""Policies change by two people; files alone change nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.databases import outside
from tests.homes import Person, hire, last_records, log_size, opened, record_state

from llmos.errors import ApprovalConflict, PermissionDenied, PolicyError
from llmos.kernel.policy import Policy
from llmos.system import System

HOLD = '@id("hold") forbid (principal, action == Action::"chat", resource);'


@pytest.fixture
def bob(home: Path, tmp_path: Path) -> Person:
    return hire(home, "bob", "steward", tmp_path)


@pytest.fixture
def draft(home: Path) -> Path:
    (home / "policy/hold.cedar").write_text(HOLD)
    return home / "policy"


def chat_allowed(home: Path) -> bool:
    with opened(home) as system:
        allowed: bool = system.policies.test("admin", "chat", model="tiny")["allowed"]
        return allowed


def test_a_file_that_was_edited_changes_nothing(home: Path, draft: Path) -> None:
    assert chat_allowed(home)
    (draft / "default.cedar").write_text("forbid (principal, action, resource);")
    assert chat_allowed(home)


def test_two_people_put_a_draft_in_force(home: Path, draft: Path, bob: Person) -> None:
    with opened(home) as system:
        asked = system.policies.propose(reason="the study is on hold")
        proposed = last_records(system, 1)[0]
        assert (proposed["action"], proposed["details"]["approval"]) == ("manage-policy", asked.id)
        assert system.policies.test("admin", "chat", model="tiny")["allowed"]
    assert chat_allowed(home)
    (draft / "hold.cedar").write_text("what was proposed stays what was proposed")
    with bob.at_work() as system:
        assert system.approvals.decide(asked.id, approve=True)["state"] == "approved"
        record = last_records(system, 1)[0]
        assert record["details"]["request"]["digest"] == asked.subject
        assert HOLD not in str(record)
    assert not chat_allowed(home)
    with opened(home) as system:
        assert system.policies.in_force().digest == asked.subject
        assert system.policies.in_force().files["hold.cedar"] == HOLD


def test_a_refused_draft_is_not_in_force(home: Path, draft: Path, bob: Person) -> None:
    with opened(home) as system:
        asked = system.policies.propose(draft, reason="a try")
    with bob.at_work() as system:
        system.approvals.decide(asked.id, approve=False)
    assert chat_allowed(home)


def test_the_proposer_alone_puts_nothing_in_force(home: Path, draft: Path, tmp_path: Path) -> None:
    root = hire(home, "root", "administrator", tmp_path)
    with root.at_work() as system:
        asked = system.policies.propose(draft, reason="a try")
        with pytest.raises(ApprovalConflict, match="another person"):
            system.approvals.decide(asked.id, approve=True)
    assert chat_allowed(home)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('permit (principal, action == Action::"fly", resource);', "fly"),
        ('forbid (principal, action == Action::"approve", resource);', "no two people"),
        ('forbid (principal, action == Action::"manage-policy", resource);', "no two people"),
    ],
)
def test_what_could_never_be_changed_back_is_not_proposed(
    home: Path, system: System, bob: Person, text: str, why: str
) -> None:
    (home / "policy/hold.cedar").write_text(text)
    size = log_size(system)
    with pytest.raises(PolicyError, match=why):
        system.policies.propose(reason="a try")
    assert (system.approvals.overview(), log_size(system)) == ([], size)


def test_one_person_alone_cannot_get_into_that_corner(system: System, draft: Path) -> None:
    with pytest.raises(PolicyError, match="no two people"):
        system.policies.propose(reason="there is only one user")


def test_services_do_not_count_as_a_way_back(home: Path, draft: Path, tmp_path: Path) -> None:
    hire(home, "robot", "steward", tmp_path, kind="service")
    with opened(home) as system, pytest.raises(PolicyError, match="no two people"):
        system.policies.propose(reason="a try")


def test_what_is_in_force_is_not_proposed_again(home: Path, bob: Person) -> None:
    with opened(home) as system, pytest.raises(ApprovalConflict, match="in force already"):
        system.policies.propose(reason="once more")


def test_policy_says_who_may_propose_policies(home: Path, draft: Path, bob: Person) -> None:
    with bob.at_work() as system, pytest.raises(PermissionDenied):
        system.policies.propose(draft, reason="a try")


def test_a_home_made_before_adopts_its_files_once_and_says_so(home: Path, draft: Path) -> None:
    with outside(home) as conn:
        conn.exec_driver_sql("DELETE FROM settings WHERE name = 'policy'")
        conn.exec_driver_sql("DELETE FROM policy_versions")
    record_state(home)
    with opened(home) as system:
        (record,) = last_records(system, 1)
        assert (record["action"], record["actor"]) == ("manage-policy", "llmos")
        assert record["details"]["digest"] == Policy.load(draft).digest
        size = log_size(system)
    (draft / "hold.cedar").unlink()
    assert not chat_allowed(home)
    with opened(home) as system:
        assert log_size(system) == size


def test_a_home_made_before_does_not_open_with_wrong_files(home: Path, draft: Path) -> None:
    with outside(home) as conn:
        conn.exec_driver_sql("DELETE FROM settings WHERE name = 'policy'")
    shutil.rmtree(draft)
    draft.mkdir()
    with pytest.raises(PolicyError, match="no"), opened(home):
        pass
