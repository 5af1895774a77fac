from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, select, update
from tests.databases import open_store

from llmos.accounts.api_keys import ApiKey
from llmos.accounts.api_keys import issued as issued_keys
from llmos.errors import (
    AuthenticationError,
    PrincipalExists,
    RequestError,
    StorageError,
    UnknownKey,
    UnknownPrincipal,
)
from llmos.kernel import schema
from llmos.kernel.identity import Identity, IssuedKey, Kind, Principal, Role
from llmos.kernel.store import Store, timestamp

pytestmark = pytest.mark.databases

PEPPER = bytes(range(32))


def listed_keys(store: Store) -> tuple[ApiKey, ...]:
    with store.read() as conn:
        return issued_keys(conn)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = open_store(tmp_path / "kernel.db", schema.KERNEL)
    yield store
    store.close()


@pytest.fixture
def identity(store: Store) -> Identity:
    return Identity(store, PEPPER)


@pytest.fixture
def alice(store: Store, identity: Identity) -> Principal:
    with store.transaction() as conn:
        return identity.add_principal(conn, "alice", frozenset({Role.ENGINEER, Role.AUDITOR}))


def issue(
    store: Store,
    identity: Identity,
    principal: Principal,
    *,
    models: frozenset[str] | None = None,
    expires_at: datetime | None = None,
) -> IssuedKey:
    with store.transaction() as conn:
        return identity.create_key(conn, principal, "laptop", models, expires_at)


def refused(identity: Identity, token: str) -> str:
    with pytest.raises(AuthenticationError) as caught:
        identity.authenticate(token)
    return f"{caught.value.message} {caught.value.hint}"


def test_a_principal_is_found_by_name(identity: Identity, alice: Principal) -> None:
    assert identity.principal("alice") == alice
    assert alice.roles == {Role.ENGINEER, Role.AUDITOR}
    assert (alice.models, alice.key_id) == (None, None)
    with pytest.raises(UnknownPrincipal, match="bob"):
        identity.principal("bob")


def test_a_name_is_given_once_and_never_again(
    store: Store, identity: Identity, alice: Principal
) -> None:
    def add_again() -> None:
        with store.transaction() as conn:
            identity.add_principal(conn, "alice", frozenset({Role.ADMINISTRATOR}))

    with pytest.raises(PrincipalExists):
        add_again()
    with store.transaction() as conn:
        identity.disable_principal(conn, "alice")
    with pytest.raises(PrincipalExists):
        add_again()
    assert identity.principals() == ()


def test_disabling_refuses_the_principal_and_its_keys(
    store: Store, identity: Identity, alice: Principal
) -> None:
    key = issue(store, identity, alice)
    assert identity.principals() == (alice,)
    with store.transaction() as conn:
        identity.disable_principal(conn, "alice")
    with pytest.raises(AuthenticationError, match="alice was disabled"):
        identity.principal("alice")
    refused(identity, key.token)
    with pytest.raises(UnknownPrincipal), store.transaction() as conn:
        identity.disable_principal(conn, "bob")


def test_a_key_stands_for_its_principal(store: Store, identity: Identity, alice: Principal) -> None:
    everything = issue(store, identity, alice)
    assert identity.authenticate(everything.token) == Principal(
        alice.id, "alice", alice.roles, None, everything.id
    )
    narrow = issue(store, identity, alice, models=frozenset({"m1", "m2"}))
    assert identity.authenticate(narrow.token).models == frozenset({"m1", "m2"})
    nothing = issue(store, identity, alice, models=frozenset())
    assert identity.authenticate(nothing.token).models == frozenset()


def test_the_token_is_shown_once_and_stored_nowhere(
    store: Store, identity: Identity, alice: Principal
) -> None:
    key = issue(store, identity, alice)
    assert re.fullmatch(r"llmos_[0-9A-Za-z]{8}_[0-9A-Za-z]{43}", key.token)
    assert key.token.split("_")[1] == key.id
    secret = key.token.split("_")[2]
    assert secret not in repr(key)
    with store.read() as conn:
        for table in schema.KERNEL.sorted_tables:
            stored = repr(conn.execute(select(table)).all())
            assert secret not in stored
            assert repr(secret.encode()) not in stored
    assert issue(store, identity, alice).token != key.token


def test_the_pepper_is_needed_to_check_a_key(
    store: Store, identity: Identity, alice: Principal
) -> None:
    key = issue(store, identity, alice)
    refused(Identity(store, bytes(32)), key.token)
    with pytest.raises(AuthenticationError, match="32 bytes"):
        Identity(store, b"short")


def test_every_refusal_reads_the_same(store: Store, identity: Identity, alice: Principal) -> None:
    expired = issue(store, identity, alice, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    revoked, good = issue(store, identity, alice), issue(store, identity, alice)
    with store.transaction() as conn:
        identity.revoke_key(conn, revoked.id)
    last = "0" if good.token[-1] != "0" else "1"
    tokens = (
        expired.token,
        revoked.token,
        good.token[:-1] + last,  # right id, wrong secret
        good.token + "0",
        good.token + "\n",
        f"llmos_{'0' * 8}_{good.token.split('_')[2]}",  # unknown id
        "",
        "sk-something-else",
    )
    assert len({refused(identity, token) for token in tokens}) == 1
    assert identity.authenticate(good.token).name == "alice"


def test_a_key_is_valid_until_it_expires(
    store: Store, identity: Identity, alice: Principal
) -> None:
    later = datetime.now(UTC) + timedelta(hours=1)
    key = issue(store, identity, alice, expires_at=later)
    assert identity.authenticate(key.token).key_id == key.id
    with pytest.raises(RequestError, match="time zone"):
        issue(store, identity, alice, expires_at=later.replace(tzinfo=None))


def test_keys_are_listed_with_their_fate(
    store: Store, identity: Identity, alice: Principal
) -> None:
    later = datetime.now(UTC) + timedelta(days=1)
    first = issue(store, identity, alice)
    second = issue(store, identity, alice, models=frozenset({"m"}), expires_at=later)
    for _ in range(2):  # revoking twice keeps the first time
        with store.transaction() as conn:
            identity.revoke_key(conn, first.id)
    issued = listed_keys(store)
    listed = {key.id: key for key in issued}
    assert set(listed) == {first.id, second.id}
    assert listed[first.id].revoked_at is not None
    assert listed[first.id].models is None
    assert (listed[second.id].models, listed[second.id].revoked_at) == (frozenset({"m"}), None)
    assert listed[second.id].expires_at == timestamp(later)
    assert (listed[second.id].principal, listed[second.id].label) == ("alice", "laptop")
    with pytest.raises(UnknownKey), store.transaction() as conn:
        identity.revoke_key(conn, "00000000")


@pytest.fixture(scope="module")
def nobody(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Identity]:
    store = open_store(tmp_path_factory.mktemp("empty") / "kernel.db", schema.KERNEL)
    yield Identity(store, PEPPER)
    store.close()


@settings(deadline=None)
@given(token=st.text())
@example("llmos_" + "0" * 8 + "_" + "٣" * 43)  # digits, but not of this alphabet
@example("\ud800")
def test_any_text_gets_the_same_refusal(nobody: Identity, token: str) -> None:
    assert refused(nobody, token) == refused(nobody, "")


def test_a_key_is_narrowed_to_actions_and_a_purpose(
    store: Store, identity: Identity, alice: Principal
) -> None:
    actions = frozenset({"chat", "list-models"})
    with store.transaction() as conn:
        issued = identity.create_key(
            conn, alice, "app", None, None, actions=actions, purpose="research"
        )
    who = identity.authenticate(issued.token)
    assert (who.models, who.actions, who.purpose) == (None, actions, "research")
    (key,) = listed_keys(store)
    assert (key.models, key.actions, key.purpose) == (None, actions, "research")
    with store.transaction() as conn:
        nothing = identity.create_key(conn, alice, "", None, None, actions=frozenset())
    assert identity.authenticate(nothing.token).actions == frozenset()


def test_a_tenant_is_part_of_who_acts(store: Store, identity: Identity, alice: Principal) -> None:
    issued = issue(store, identity, alice)
    assert identity.authenticate(issued.token).tenant is None
    for tenant in ("ward", None):
        with store.transaction() as conn:
            identity.set_tenant(conn, "alice", tenant)
        assert identity.authenticate(issued.token).tenant == tenant
        assert identity.principal("alice").tenant == tenant
        assert [who.tenant for who in identity.principals()] == [tenant]
    with pytest.raises(UnknownPrincipal), store.transaction() as conn:
        identity.set_tenant(conn, "nobody", "ward")


def last_used(store: Store) -> str | None:
    (key,) = listed_keys(store)
    return key.last_used_at


def set_last_used(store: Store, at: datetime) -> None:
    with store.transaction() as conn:
        conn.execute(update(schema.api_keys).values(last_used_at=timestamp(at)))


def test_the_last_use_is_written_once_a_minute(
    store: Store, identity: Identity, alice: Principal
) -> None:
    token = issue(store, identity, alice).token
    assert last_used(store) is None
    refused(identity, token[:-1])
    assert last_used(store) is None
    identity.authenticate(token)
    used = last_used(store)
    assert used is not None
    assert used >= timestamp(datetime.now(UTC) - timedelta(seconds=30))
    recently = datetime.now(UTC) - timedelta(seconds=40)
    set_last_used(store, recently)
    identity.authenticate(token)
    assert last_used(store) == timestamp(recently)
    set_last_used(store, recently - timedelta(seconds=40))
    identity.authenticate(token)
    assert (last_used(store) or "") > timestamp(recently)


def test_noting_a_use_waits_for_nobody(
    store: Store, identity: Identity, alice: Principal, tmp_path: Path
) -> None:
    token = issue(store, identity, alice).token
    elsewhere = open_store(tmp_path / "kernel.db", schema.KERNEL)
    with elsewhere.transaction():
        assert identity.authenticate(token).id == alice.id
    assert last_used(store) is None
    elsewhere.close()


def test_noting_a_use_fails_no_request_where_nothing_can_be_written(
    store: Store, identity: Identity, alice: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = issue(store, identity, alice).token

    @contextmanager
    def read_only(_store: Store, *, wait: bool = True) -> Iterator[Connection]:
        with store.read() as conn:  # every write through it fails as on a read-only disk
            yield conn

    monkeypatch.setattr(Store, "transaction", read_only)
    with pytest.raises(StorageError), store.transaction() as conn:
        identity.set_roles(conn, "alice", frozenset())
    assert identity.authenticate(token).id == alice.id
    assert last_used(store) is None


def test_a_key_ends_at_the_time_given_or_before(
    store: Store, identity: Identity, alice: Principal
) -> None:
    now = datetime.now(UTC)
    forever = issue(store, identity, alice)
    short = issue(store, identity, alice, expires_at=now + timedelta(hours=1))
    with store.transaction() as conn:
        for key in (forever, short):
            identity.end_key(conn, key.id, now + timedelta(hours=2))
    ends = {key.id: key.expires_at for key in listed_keys(store)}
    assert ends[forever.id] == timestamp(now + timedelta(hours=2))
    assert ends[short.id] == timestamp(now + timedelta(hours=1))
    with store.transaction() as conn:
        identity.end_key(conn, forever.id, now)
    refused(identity, forever.token)


def test_roles_change_at_once_for_keys_too(
    store: Store, identity: Identity, alice: Principal
) -> None:
    token = issue(store, identity, alice).token
    with store.transaction() as conn:
        identity.set_roles(conn, "alice", frozenset({Role.SITE}))
    assert identity.authenticate(token).roles == identity.principal("alice").roles == {Role.SITE}
    with pytest.raises(UnknownPrincipal, match="bob"), store.transaction() as conn:
        identity.set_roles(conn, "bob", frozenset())


def test_a_service_is_known_as_one(store: Store, identity: Identity, alice: Principal) -> None:
    with store.transaction() as conn:
        robot = identity.add_principal(conn, "robot", frozenset({Role.SITE}), Kind.SERVICE)
    assert identity.principal("robot") == robot
    assert identity.authenticate(issue(store, identity, robot).token).kind is Kind.SERVICE
    assert alice.kind is Kind.PERSON
