from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import select, update

from llmos.accounts import credentials
from llmos.accounts.credentials import FREE_FAILURES, Credential
from llmos.accounts.tables import credentials as accounts_table
from llmos.errors import TamperedObject
from llmos.kernel import schema
from llmos.kernel.identity import Identity, Role
from llmos.kernel.store import Store
from llmos.kernel.vault import Vault

SEED = bytes(range(20))
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store.open(tmp_path / "kernel.db", schema.KERNEL)) as store:
        yield store


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[Vault]:
    with closing(Store.open(tmp_path / "keys.db", schema.KEYS)) as keys:
        yield Vault(tmp_path, keys, bytes(32))


@pytest.fixture
def ada(store: Store) -> str:
    with store.transaction() as conn:
        return Identity(store, bytes(32)).add_principal(conn, "ada", frozenset({Role.AUDITOR})).id


def find(store: Store, vault: Vault, who: str) -> Credential | None:
    with store.read() as conn:
        return credentials.find(conn, who, vault)


def set_seed(store: Store, vault: Vault, who: str, seed: bytes | None, step: int = 7) -> bool:
    with store.transaction() as conn:
        return credentials.set_seed(conn, who, seed, step, vault)


def set_password(store: Store, who: str, text: str) -> None:
    with store.transaction() as conn:
        credentials.set_password(conn, who, text)


def test_a_password_and_codes_are_kept_and_replaced(store: Store, vault: Vault, ada: str) -> None:
    assert find(store, vault, ada) is None
    assert not set_seed(store, vault, ada, SEED)  # there is no password
    set_password(store, ada, "one")
    assert find(store, vault, ada) == Credential("one", None, 0)
    assert set_seed(store, vault, ada, SEED)
    set_password(store, ada, "two")
    found = find(store, vault, ada)
    assert found == Credential("two", SEED, 7)
    assert "two" not in repr(found)
    with store.read() as conn:
        assert credentials.enrolled(conn) == {ada: True}
    assert set_seed(store, vault, ada, None, 0)
    assert find(store, vault, ada) == Credential("two", None, 0)
    with store.read() as conn:
        assert credentials.enrolled(conn) == {ada: False}


def test_a_seed_lies_wrapped_and_for_its_person_only(
    store: Store, vault: Vault, ada: str, tmp_path: Path
) -> None:
    set_password(store, ada, "one")
    set_seed(store, vault, ada, SEED)
    with store.transaction() as conn:
        wrapped = conn.execute(select(accounts_table.c.totp_seed)).scalar_one()
        bob = Identity(store, bytes(32)).add_principal(conn, "bob", frozenset()).id
        credentials.set_password(conn, bob, "two")
        row = accounts_table.c.principal_id == bob
        conn.execute(update(accounts_table).where(row).values(totp_seed=wrapped))
    store.checkpoint()
    assert SEED not in (tmp_path / "kernel.db").read_bytes()
    with pytest.raises(TamperedObject):
        find(store, vault, bob)
    assert find(store, vault, ada) == Credential("one", SEED, 7)


def test_a_time_step_is_used_once(store: Store, vault: Vault, ada: str) -> None:
    set_password(store, ada, "one")
    set_seed(store, vault, ada, SEED)
    used = []
    for step in (7, 8, 8, 6, 9):
        with store.transaction() as conn:
            used.append(credentials.use_step(conn, ada, step))
    assert used == [False, True, False, False, True]


def begin(store: Store, subject: str, at: datetime) -> int | None:
    with store.transaction() as conn:
        return credentials.begin_attempt(conn, subject, at)


def test_failures_in_a_row_bar_longer_and_longer(store: Store) -> None:
    at = NOON
    for failure in range(1, FREE_FAILURES + 1):
        assert begin(store, "ada", at) == failure
    for bar_s in (30, 60, 120, 240, 480, 960, 1920, 3600, 3600):
        assert begin(store, "ada", at + timedelta(seconds=bar_s - 1)) is None
        at += timedelta(seconds=bar_s)
        assert begin(store, "ada", at) is not None
    assert begin(store, "bob", at) == 1


def test_a_login_forgets_failures_and_bars(store: Store) -> None:
    for _ in range(FREE_FAILURES):
        begin(store, "ada", NOON)
    assert begin(store, "ada", NOON) is None
    with store.transaction() as conn:
        credentials.end_attempts(conn, "ada")
    assert begin(store, "ada", NOON) == 1
