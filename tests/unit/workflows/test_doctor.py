from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import text
from tests.databases import outside
from tests.homes import hire, opened, record_state

from llmos.config import Config, load
from llmos.kernel.policy import Policy
from llmos.workflows import doctor
from llmos.workflows.doctor import Finding


def findings(home: Path) -> dict[str, Finding]:
    return {found.name: found for found in doctor.run(load(home=home, device="cpu"))}


def test_a_good_home_on_a_good_machine(home: Path) -> None:
    found = findings(home)
    assert list(found) == ["python", "memory", "disk", "device", "home", "policies"]
    assert found["policies"].ok
    assert found["policies"].detail.endswith("are in force")
    assert found["home"].ok
    assert "ledger equals its events" in found["home"].detail
    assert found["python"].ok
    assert found["device"].detail.startswith("cpu, PyTorch")
    assert found["home"].to_dict() == {"name": "home", "ok": True, "detail": found["home"].detail}


def test_no_home_yet_is_no_fault(tmp_path: Path) -> None:
    found = findings(tmp_path / "a" / "b")
    assert found["home"].ok
    assert "llmos init" in found["home"].detail
    assert str(tmp_path) in found["disk"].detail


def execute(home: Path, statement: str, **values: str) -> None:
    with outside(home) as conn:
        conn.execute(text(statement), values)


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE budget_pools SET spent = 1 WHERE dataset = 'ward'", "not as the last act left it"),
        (
            "UPDATE log_entries SET data = (SELECT data FROM log_entries WHERE idx = 0) "
            "WHERE idx < 2",
            "",
        ),
        ("DELETE FROM log_entries WHERE idx = 3", ""),
    ],
)
def test_a_home_that_was_changed_from_outside(statement: str, said: str, home: Path) -> None:
    execute(home, statement)
    found = findings(home)["home"]
    assert not found.ok
    assert said in found.detail
    assert found.detail


def test_a_home_that_others_may_enter(home: Path) -> None:
    home.chmod(0o755)
    found = findings(home)["home"]
    assert not found.ok
    assert f"chmod 700 {home}" in found.detail


def test_a_folder_that_is_no_home_and_a_home_without_its_key(home: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir(mode=0o700)
    assert "there is no home" in findings(tmp_path / "empty")["home"].detail
    (home / "root.key").unlink()
    assert not findings(home)["home"].ok


def test_a_machine_that_is_too_small_or_lacks_a_device(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_ENOUGH_DISK_BYTES", 1 << 80)
    monkeypatch.setattr(doctor, "_ENOUGH_MEMORY_BYTES", 1 << 80)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config: Config = load(home=home, device="cuda")
    found = {finding.name: finding for finding in doctor.run(config)}
    assert [name for name in found if not found[name].ok] == ["memory", "disk", "device"]


def test_drafts_that_differ_are_named(home: Path) -> None:
    draft = home / "policy/mine.cedar"
    draft.write_text("forbid (principal, action, resource);")
    assert "llmos policy apply" in findings(home)["policies"].detail
    draft.write_text("nonsense")
    found = findings(home)["policies"]
    assert (found.ok, "not valid" in found.detail) == (True, True)


def test_policies_that_the_log_does_not_know_of_are_a_fault(home: Path) -> None:
    other = Policy.parse({"all.cedar": "permit (principal, action, resource);"})
    files = json.dumps(dict(other.files))
    execute(
        home,
        "INSERT INTO policy_versions VALUES (:digest, :files)",
        digest=other.digest,
        files=files,
    )
    execute(home, "UPDATE settings SET value = :digest WHERE name = 'policy'", digest=other.digest)
    record_state(home)
    found = findings(home)["policies"]
    assert (found.ok, "the log does not know" in found.detail) == (False, True)


def test_the_log_knows_policies_that_two_people_changed(home: Path, tmp_path: Path) -> None:
    bob = hire(home, "bob", "steward", tmp_path)
    (home / "policy/mine.cedar").write_text("// nothing more")
    with opened(home) as system:
        asked = system.policies.propose(reason="a comment")
    with bob.at_work() as system:
        system.approvals.decide(asked.id, approve=True)
    found = findings(home)["policies"]
    assert (found.ok, found.detail) == (True, f"{asked.subject[:12]} are in force")
