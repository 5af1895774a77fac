"""Roles, service accounts, disabled people, rotated and narrowed keys."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.homes import (
    TRAINING,
    UNITS,
    checked_books,
    hire,
    last_records,
    log_size,
    write_notes,
)

from llmos.accounts import totp
from llmos.errors import (
    ApprovalConflict,
    AuthenticationError,
    BudgetExceeded,
    ConfigError,
    DataError,
    PermissionDenied,
    RequestError,
    UnknownKey,
    UnknownModel,
    UnknownPrincipal,
)
from llmos.system import System
from llmos.workflows import books

PASSWORD = "correct horse battery"


def line(system: System, name: str) -> dict[str, Any]:
    (found,) = [row for row in system.people.overview() if row["name"] == name]
    return found


def key(system: System, key_id: str) -> dict[str, Any]:
    listed = system.access.keys()
    (found,) = [row for row in listed if row["id"] == key_id]
    return found


def test_people_and_services_are_listed_with_how_they_log_in(system: System) -> None:
    system.access.add_user("ada", ["auditor", "developer"])
    system.access.add_user("robot", ["site"], kind="service")
    assert line(system, "ada") == {
        "name": "ada", "kind": "person", "roles": ["auditor", "developer"], "tenant": None,
        "login": "no",
    }  # fmt: skip
    assert (line(system, "robot")["kind"], line(system, "robot")["login"]) == ("service", "no")
    system.people.set_password("ada", PASSWORD)
    assert line(system, "ada")["login"] == "password"
    seed = totp.new_seed()
    system.people.set_codes("ada", seed, totp.code(seed, int(time.time() // totp.STEP_S)))
    assert line(system, "ada")["login"] == "password and code"
    system.people.set_codes("ada", None, "")
    assert line(system, "ada")["login"] == "password"


def test_a_persons_jobs_count_for_their_tenant(system: System, home: Path, tmp_path: Path) -> None:
    system.import_data(
        write_notes(tmp_path / "clinic.jsonl"), unit="patient_id", text="text",
        epsilon=8, delta=1e-5, holdout=0, tenant_epsilons={"ward": 2},
    )  # fmt: skip
    job = TRAINING | {"dataset": "clinic"}
    ada = hire(home, "ada", "engineer", tmp_path)
    system.people.set_tenant("ada", "ward")
    assert (line(system, "ada")["tenant"], last_records(system, 1)[0]["details"]["tenant"]) == (
        "ward",
        "ward",
    )
    with ada.at_work() as theirs:
        assert theirs.who.tenant == "ward"
        priced = theirs.budgets.what_if(
            "clinic", epsilon=3.0, batch=UNITS, steps=8, purpose="training"
        )
        admitted = {pool.pool: pool.admitted for pool in priced.pools}
        assert admitted == {"clinic": True, "clinic@ward": False}
        with pytest.raises(BudgetExceeded, match="clinic@ward cannot pay"):
            theirs.submit(theirs.plan(**job))
        small = theirs.submit(theirs.plan(**job | {"epsilon": 1.0}))
    pools = {pool.id: pool.held for pool in system.kernel.budget.pools()}
    assert pools["clinic"] > 0
    assert pools["clinic@ward"] > 0
    system.people.set_tenant("ada", None)  # the job stays what it was planned as
    assert line(system, "ada")["tenant"] is None
    assert system.kernel.budget.reservation(small).tenant == "ward"
    system.jobs.cancel(small)
    assert not any(pool.held for pool in system.kernel.budget.pools())
    system.submit(system.plan(**job))  # of no tenant: the whole can pay
    checked_books(system)
    books.check(system.kernel, system.parts.jobs)


def test_a_tenant_is_named_as_datasets_are(system: System) -> None:
    before = log_size(system)
    for name in ("", "Ward 7", "a/b", "x" * 64):
        with pytest.raises(DataError, match="cannot be a tenant"):
            system.access.add_user("eve", ["engineer"], tenant=name)
        with pytest.raises(DataError, match="cannot be a tenant"):
            system.people.set_tenant("admin", name)
    with pytest.raises(UnknownPrincipal):
        system.people.set_tenant("nobody", "ward")
    assert [row["name"] for row in system.people.overview()] == ["admin"]
    assert (line(system, "admin")["tenant"], log_size(system)) == (None, before + 9)  # failures
    assert system.access.add_user("eve", ["engineer"], tenant="ward").tenant == "ward"
    assert line(system, "eve")["tenant"] == "ward"


def test_roles_change_and_are_recorded(system: System) -> None:
    system.access.add_user("ada", ["auditor"])
    system.people.set_roles("ada", ["developer", "engineer"])
    assert line(system, "ada")["roles"] == ["developer", "engineer"]
    (record,) = last_records(system, 1)
    assert record["details"]["roles"] == ["developer", "engineer"]
    with pytest.raises(ConfigError, match="king"):
        system.people.set_roles("ada", ["king"])
    with pytest.raises(ConfigError, match="king"):
        system.access.add_user("bob", ["king"])
    with pytest.raises(ConfigError, match="ghost"):
        system.access.add_user("bob", ["auditor"], kind="ghost")
    with pytest.raises(UnknownPrincipal):
        system.people.set_roles("nobody", ["auditor"])
    assert line(system, "ada")["roles"] == ["developer", "engineer"]


def test_the_last_administrator_stays(system: System) -> None:
    with pytest.raises(RequestError, match="no administrator"):
        system.people.disable("admin")
    with pytest.raises(RequestError, match="no administrator"):
        system.people.set_roles("admin", ["auditor"])
    assert line(system, "admin")["roles"] == ["administrator"]
    system.access.add_user("ada", ["administrator"])
    system.people.set_roles("ada", ["administrator", "auditor"])
    system.people.set_roles("ada", ["auditor"])
    with pytest.raises(RequestError):
        system.people.disable("admin")


def test_who_was_disabled_can_do_nothing_and_stays_in_old_records(
    home: Path, system: System, tmp_path: Path
) -> None:
    bob = hire(home, "bob", "administrator", tmp_path)
    with bob.at_work() as his:
        asked = his.budgets.propose_raise("notes", epsilon=99, reason="more")
    system.people.disable("bob")
    with bob.at_work() as his, pytest.raises(AuthenticationError):
        _ = his.who
    assert "bob" not in {row["name"] for row in system.people.overview()}
    assert system.approvals.facts(asked.id)["proposer"] == "bob"


def test_only_people_have_passwords(system: System) -> None:
    system.access.add_user("robot", ["engineer"], kind="service")
    size = log_size(system)
    with pytest.raises(RequestError, match="service account"):
        system.people.set_password("robot", PASSWORD)
    with pytest.raises(RequestError, match="service account"):
        system.people.set_codes("robot", totp.new_seed(), "000000")
    assert log_size(system) == size


def test_codes_need_a_password_and_a_first_code(system: System) -> None:
    system.access.add_user("ada", ["auditor"])
    seed = totp.new_seed()
    right = totp.code(seed, int(time.time() // totp.STEP_S))
    with pytest.raises(RequestError, match="no password"):
        system.people.set_codes("ada", seed, right)
    system.people.set_password("ada", PASSWORD)
    with pytest.raises(AuthenticationError, match="not the present code"):
        system.people.set_codes("ada", seed, totp.code(totp.new_seed(), 1))
    assert line(system, "ada")["login"] == "password"


def test_a_service_account_is_no_second_person(home: Path, system: System, tmp_path: Path) -> None:
    robot = hire(home, "robot", "steward", tmp_path, kind="service")
    before = system.kernel.budget.pool("notes")
    asked = system.budgets.propose_raise("notes", epsilon=99, reason="more")
    with robot.at_work() as its:
        with pytest.raises(ApprovalConflict, match="service account"):
            its.approvals.decide(asked.id, approve=True)
        with pytest.raises(ApprovalConflict, match="service account"):
            its.budgets.propose_raise("notes", epsilon=99, reason="more")
    assert system.approvals.facts(asked.id)["state"] == "open"
    assert system.kernel.budget.pool("notes") == before


def test_a_rotated_key_has_the_same_rights_and_the_old_one_ends(system: System) -> None:
    system.access.add_user("app", ["developer"], kind="service")
    old = system.access.create_key(
        user="app", label="ward", models=["tiny"], actions=["chat"], purpose="care", days=30
    )
    new = system.access.rotate_key(old.id, overlap=timedelta(hours=2))
    was, now = key(system, old.id), key(system, new.id)
    same = ("principal", "label", "models", "actions", "purpose")
    assert [was[name] for name in same] == [now[name] for name in same]
    at = datetime.now(UTC)
    assert abs(datetime.fromisoformat(was["expires_at"]) - at - timedelta(hours=2)).seconds < 60
    assert abs(datetime.fromisoformat(now["expires_at"]) - at - timedelta(days=30)).seconds < 60
    for token in (old.token, new.token):
        assert system.kernel.identity.authenticate(token).name == "app"
    (record,) = last_records(system, 1)
    assert (record["details"]["rotate"], record["details"]["issued"]) == (old.id, new.id)
    at_once = system.access.rotate_key(new.id, overlap=timedelta(0))
    with pytest.raises(AuthenticationError):
        system.kernel.identity.authenticate(new.token)
    assert system.kernel.identity.authenticate(at_once.token).purpose == "care"


def test_a_key_without_an_end_rotates_into_one_without_an_end(system: System) -> None:
    old = system.access.create_key()
    new = system.access.rotate_key(old.id, overlap=timedelta(hours=1))
    assert key(system, new.id)["expires_at"] is None
    assert key(system, old.id)["expires_at"] is not None


def test_only_a_valid_key_is_rotated(system: System) -> None:
    old = system.access.create_key()
    with pytest.raises(RequestError, match="negative"):
        system.access.rotate_key(old.id, overlap=timedelta(hours=-1))
    system.access.revoke_key(old.id)
    ended = system.access.create_key()
    system.access.rotate_key(ended.id, overlap=timedelta(0))
    count = len(system.access.keys())
    for key_id in (old.id, ended.id, "00000000"):
        with pytest.raises(UnknownKey):
            system.access.rotate_key(key_id, overlap=timedelta(hours=1))
    assert len(system.access.keys()) == count


def test_a_key_for_some_actions_does_no_others(home: Path, system: System, tmp_path: Path) -> None:
    who = hire(home, "bob", "administrator", tmp_path)
    narrow = system.access.create_key(user="bob", actions=["read-log"])
    who.key_file.write_text(narrow.token)
    with who.at_work() as his:
        assert his.log.read()
        for act in (
            his.access.create_key,
            lambda: his.people.set_password("bob", PASSWORD),
            lambda: his.budgets.propose_raise("notes", epsilon=99, reason="more"),
        ):
            with pytest.raises(PermissionDenied, match="the API key is not for"):
                act()
        assert last_records(his, 1)[0]["details"]["api_key"] == narrow.id
    assert system.approvals.overview() == []


def test_what_a_key_is_narrowed_to_must_exist(system: System) -> None:
    with pytest.raises(ConfigError, match="fly"):
        system.access.create_key(actions=["fly"])
    with pytest.raises(UnknownModel):
        system.access.create_key(models=["nothing"])
    assert system.access.keys() == []
