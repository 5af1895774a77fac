"""Who logs in gets a key; every failure looks the same, is counted and is recorded."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from tests.homes import hire, last_records, log_size, opened

from llmos.accounts import credentials, passwords, tables, totp
from llmos.errors import AuthenticationError, PermissionDenied, StorageError
from llmos.kernel.identity import IssuedKey
from llmos.kernel.store import timestamp
from llmos.system import System
from llmos.workflows import login

PASSWORD = "correct horse battery"


@pytest.fixture
def ada(system: System) -> str:
    system.access.add_user("ada", ["auditor"])
    system.people.set_password("ada", PASSWORD)
    return "ada"


def refused(system: System, *what: str) -> str:
    with pytest.raises(AuthenticationError) as caught:
        system.people.log_in(*what)
    return f"{caught.value.message} {caught.value.hint}"


def enrol(system: System, name: str) -> bytes:
    """Ask for codes, enrolled some steps ago, so that the present code is still fresh."""
    seed = totp.new_seed()
    system.people.set_codes(name, seed, totp.code(seed, int(time.time() // totp.STEP_S)))
    with system.kernel.store.transaction() as conn:
        conn.execute(update(tables.credentials).values(totp_step=1))
    return seed


def test_a_password_becomes_a_key_for_some_hours(system: System, ada: str) -> None:
    issued = system.people.log_in(ada, PASSWORD)
    who = system.kernel.identity.authenticate(issued.token)
    assert (who.name, who.key_id, who.models, who.actions) == ("ada", issued.id, None, None)
    listed = system.access.keys()
    (key,) = [key for key in listed if key["id"] == issued.id]
    left = datetime.fromisoformat(key["expires_at"]) - datetime.now(UTC)
    assert timedelta(hours=11) < left <= login.LIFETIME
    (record,) = last_records(system, 1)
    assert (record["actor"], record["action"], record["outcome"]) == ("ada", "login", "done")
    assert record["details"]["issued"] == issued.id
    assert PASSWORD not in str(record)
    assert issued.token not in str(record)


def test_every_failure_reads_the_same_and_does_the_same_work(
    system: System, ada: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    system.access.add_user("robot", ["auditor"], kind="service")
    system.access.add_user("newcomer", ["auditor"])
    system.access.add_user("gone", ["auditor"])
    system.people.set_password("gone", PASSWORD)
    system.people.disable("gone")
    checks: list[str | None] = []
    real = passwords.verify

    def counted(kept: str | None, password: str) -> bool:
        checks.append(kept)
        return real(kept, password)

    monkeypatch.setattr(passwords, "verify", counted)
    attempts = [(ada, "wrong"), ("nobody", PASSWORD), ("robot", PASSWORD), ("newcomer", PASSWORD),
                ("gone", PASSWORD), ("\ud800", ""), (ada, "")]  # fmt: skip
    assert len({refused(system, *attempt) for attempt in attempts}) == 1
    assert len(checks) == len(attempts)
    assert [kept is None for kept in checks] == [False, True, True, True, True, True, False]


def test_a_failure_is_recorded_without_the_name_that_nobody_has(system: System, ada: str) -> None:
    refused(system, ada, "wrong")
    refused(system, "my password typed as a name", "x")
    known, unknown = last_records(system, 2)
    assert (known["actor"], known["action"], known["outcome"]) == ("ada", "login", "denied")
    assert known["details"]["failures"] == 1
    assert unknown["actor"] == "unknown"
    assert "typed" not in str(unknown)


@pytest.mark.parametrize("name", ["ada", "nobody"])
def test_after_some_failures_even_the_right_password_waits(
    system: System, ada: str, name: str
) -> None:
    for _ in range(credentials.FREE_FAILURES):
        refused(system, name, "wrong")
    size = log_size(system)
    said = {refused(system, name, PASSWORD) for _ in range(2)}
    assert said == {refused(system, "somebody else", "x")}
    assert log_size(system) == size + 1  # what is barred fills no log
    if name == "nobody":
        assert system.people.log_in(ada, PASSWORD)
        return
    with system.kernel.store.transaction() as conn:
        past = timestamp(datetime.now(UTC) - timedelta(seconds=1))
        conn.execute(update(tables.login_attempts).values(barred_until=past))
    assert system.people.log_in(ada, PASSWORD)
    refused(system, ada, "wrong")
    assert last_records(system, 1)[0]["details"]["failures"] == 1  # counted anew


def test_attempts_at_once_are_all_counted(home: Path, system: System, ada: str) -> None:
    guesses = credentials.FREE_FAILURES + 3
    outcomes: list[bool] = []

    def guess(number: int) -> None:
        with opened(home) as mine:
            try:
                mine.people.log_in(ada, f"wrong {number}")
            except AuthenticationError:
                outcomes.append(False)

    threads = [threading.Thread(target=guess, args=(number,)) for number in range(guesses)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [False] * guesses
    failed = [r for r in last_records(system, log_size(system)) if r["outcome"] == "denied"]
    assert len(failed) == credentials.FREE_FAILURES


def test_a_code_is_asked_for_and_used_once(system: System, ada: str) -> None:
    seed = enrol(system, ada)
    step = int(time.time() // totp.STEP_S)
    right = totp.code(seed, step)
    refused(system, ada, PASSWORD)
    refused(system, ada, "wrong", right)  # does not use the code up
    refused(system, ada, PASSWORD, totp.code(seed, step - 5))
    assert system.people.log_in(ada, PASSWORD, right)
    assert last_records(system, 1)[0]["details"]["second_factor"] == "totp"
    refused(system, ada, PASSWORD, right)


def test_one_code_lets_one_in_when_two_come_at_once(system: System, ada: str) -> None:
    seed = enrol(system, ada)
    step = int(time.time() // totp.STEP_S)
    real = credentials.use_step

    def beaten(conn: Any, who: str, used: int) -> bool:
        assert real(conn, who, used)  # by another process, after this one has looked
        return real(conn, who, used)

    keys = len(system.access.keys())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(credentials, "use_step", beaten)
        refused(system, ada, PASSWORD, totp.code(seed, step))
    assert len(system.access.keys()) == keys
    assert last_records(system, 1)[0]["outcome"] == "failed"


def test_policy_says_who_may_log_in(system: System) -> None:
    system.access.add_user("partner", ["site"])
    system.people.set_password("partner", PASSWORD)
    keys = len(system.access.keys())
    with pytest.raises(PermissionDenied):
        system.people.log_in("partner", PASSWORD)
    assert len(system.access.keys()) == keys
    assert last_records(system, 1)[0]["outcome"] == "denied"


def test_a_key_file_is_for_its_owner_and_replaces_only_a_key(
    system: System, ada: str, tmp_path: Path
) -> None:
    file = tmp_path / "key"
    for _ in range(2):
        login.check_place(file)
        issued = system.people.log_in(ada, PASSWORD)
        login.write_key(file, issued)
        assert file.read_text() == f"{issued.token}\n"
        assert file.stat().st_mode & 0o777 == 0o600
    other = tmp_path / "thesis.tex"
    other.write_text("mine")
    for place in (other, tmp_path):
        with pytest.raises(StorageError):
            login.check_place(place)
    with pytest.raises(StorageError):
        login.write_key(tmp_path / "missing" / "key", IssuedKey("id", "llmos_x"))
    assert {path.name for path in tmp_path.iterdir()} >= {"key", "thesis.tex"}
    assert other.read_text() == "mine"


def test_a_new_password_ends_the_other_logins_and_nothing_else(
    home: Path, system: System, ada: str, tmp_path: Path
) -> None:
    here, there = (system.people.log_in(ada, PASSWORD) for _ in range(2))
    made = system.access.create_key(user=ada, label="laptop")
    file = tmp_path / "ada.key"
    login.write_key(file, here)
    with opened(home, api_key_file=file) as hers:
        hers.people.set_password("ada", "another horse battery", present=PASSWORD)
    (record,) = last_records(system, 1)
    assert record["details"]["ended_logins"] == 1
    authenticate = system.kernel.identity.authenticate
    assert [authenticate(key.token).name for key in (here, made)] == ["ada", "ada"]
    with pytest.raises(AuthenticationError):
        authenticate(there.token)
    system.people.set_password("ada", PASSWORD)  # by an administrator, whose key is not hers
    with pytest.raises(AuthenticationError):
        authenticate(here.token)
    assert authenticate(made.token).name == "ada"


def test_who_changes_their_own_password_shows_the_present_one(home: Path, tmp_path: Path) -> None:
    bob = hire(home, "bob", "steward", tmp_path)
    new = "another horse battery"
    with bob.at_work() as system:
        system.people.set_password("bob", PASSWORD)  # there was none
        size = log_size(system)
        with pytest.raises(AuthenticationError):
            system.people.set_password("bob", new)
        with pytest.raises(AuthenticationError):
            system.people.set_codes("bob", None, "", present="wrong")
        assert log_size(system) == size + 2
        assert system.people.log_in("bob", PASSWORD)
        system.people.set_password("bob", new, present=PASSWORD)
        assert system.people.log_in("bob", new)
        refused(system, "bob", PASSWORD)
        with pytest.raises(PermissionDenied):
            system.people.set_password("admin", new)
        for _ in range(credentials.FREE_FAILURES):
            with pytest.raises(AuthenticationError):
                system.people.set_password("bob", PASSWORD, present="wrong")
        with pytest.raises(AuthenticationError):  # barred
            system.people.set_password("bob", PASSWORD, present=new)
