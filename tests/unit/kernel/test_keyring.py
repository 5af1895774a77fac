"""Tenant keys: versions, rotation, what a crash leaves, and homes made before there were any."""

from __future__ import annotations

import secrets
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import delete, func, select, update
from tests.databases import STRICT, on_disk, open_store

from llmos.crypto import keys
from llmos.errors import StorageError, TamperedObject
from llmos.kernel import keyring
from llmos.kernel.keyring import TENANT, Keyring
from llmos.kernel.schema import KEYS, object_keys, tenant_keys
from llmos.kernel.store import Store
from llmos.kernel.vault import Vault

pytestmark = pytest.mark.databases

ROOT_KEY = bytes(range(32))


class Everything:
    """A grant for all objects."""

    def permits(self, object_id: str) -> bool:
        return True


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(tmp_path / "keys.db", KEYS, busy_timeout_s=0.2)
    yield opened
    opened.close()


@pytest.fixture
def vault(tmp_path: Path, store: Store) -> Vault:
    return Vault(tmp_path, store, ROOT_KEY)


def rotate(ring: Keyring) -> tuple[int, int, int]:
    return ring.begin(), sum(iter(ring.rewrap, 0)), ring.retire()


def versions(store: Store) -> list[tuple[int, bool, bool, int]]:
    """Return of each version: number, whether its key is there, whether retired, its objects."""
    columns = tenant_keys.c
    counted = select(
        columns.version,
        columns.wrapped_key,
        columns.retired_at,
        func.count(object_keys.c.object_id),
    ).outerjoin(object_keys)
    with store.read() as conn:
        rows = conn.execute(counted.group_by(*tenant_keys.c).order_by(columns.version)).all()
    return [(row[0], row[1] is not None, row[2] is not None, row[3]) for row in rows]


def wrapped_keys(store: Store) -> dict[str, bytes]:
    with store.read() as conn:
        rows = conn.execute(select(object_keys.c.object_id, object_keys.c.wrapped_key)).all()
    return {str(row[0]): bytes(row[1]) for row in rows}


def test_the_first_object_makes_the_first_version(vault: Vault, store: Store) -> None:
    assert versions(store) == []
    vault.put("records", b"a")
    vault.put("records", b"b")
    assert versions(store) == [(1, True, False, 2)]


def test_a_rotation_wraps_every_key_anew_and_destroys_the_old_version(
    vault: Vault, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "_BATCH_KEYS", 2)
    objects = {vault.put("records", bytes([n])): bytes([n]) for n in range(5)}
    before = wrapped_keys(store)
    with store.read() as conn:
        old = conn.execute(select(tenant_keys.c.wrapped_key)).scalar_one()
    assert old in on_disk(tmp_path / "keys.db")
    assert rotate(vault.keyring) == (2, 5, 1)
    assert versions(store) == [(1, False, True, 0), (2, True, False, 5)]
    for object_id, plain in objects.items():
        assert vault.read(object_id, "records", Everything()) == plain
    for secret in (old, *before.values()):
        assert secret not in on_disk(tmp_path / "keys.db")
    assert rotate(vault.keyring) == (3, 5, 1)
    fresh = vault.put("records", b"new")
    assert versions(store)[-1] == (3, True, False, 6)
    assert vault.read(fresh, "records", Everything()) == b"new"


def test_an_empty_vault_can_be_rotated(vault: Vault, store: Store) -> None:
    assert rotate(vault.keyring) == (1, 0, 0)
    assert rotate(vault.keyring) == (2, 0, 1)
    assert versions(store) == [(1, False, True, 0), (2, True, False, 0)]


def test_a_rotation_that_was_begun_is_finished_before_another_one_begins(
    vault: Vault, store: Store
) -> None:
    vault.put("records", b"a")
    assert (vault.keyring.begin(), vault.keyring.begin()) == (2, 2)
    newer = vault.put("records", b"b")  # while the rotation is under way
    assert vault.keyring.retire() == 0, "an object still needs the old version"
    assert versions(store) == [(1, True, False, 1), (2, True, False, 1)]
    assert rotate(vault.keyring) == (2, 1, 1)
    assert vault.read(newer, "records", Everything()) == b"b"


def test_an_old_version_stays_live_while_it_cannot_be_erased(vault: Vault, store: Store) -> None:
    object_id = vault.put("records", b"a")
    vault.keyring.begin()
    assert vault.keyring.rewrap() == 1
    with store.read() as conn:
        conn.execute(select(object_keys)).all()  # a reader keeps its snapshot
        with pytest.raises(StorageError, match="someone is reading"):
            vault.keyring.retire()
    assert versions(store) == [(1, False, False, 0), (2, True, False, 1)]
    assert rotate(vault.keyring) == (2, 0, 1)
    assert vault.read(object_id, "records", Everything()) == b"a"


def test_a_key_that_does_not_open_stops_the_rotation_and_changes_nothing(
    vault: Vault, store: Store
) -> None:
    good, bad = vault.put("records", b"good"), vault.put("records", b"bad")
    with store.transaction() as conn:
        this = object_keys.c.object_id == bad
        conn.execute(update(object_keys).where(this).values(wrapped_key=bytes(60)))
    before = wrapped_keys(store)
    vault.keyring.begin()
    with pytest.raises(TamperedObject, match=bad):
        vault.keyring.rewrap()
    assert wrapped_keys(store) == before
    assert vault.keyring.retire() == 0
    assert vault.read(good, "records", Everything()) == b"good"
    vault.delete(bad)
    assert rotate(vault.keyring) == (2, 1, 1)


@pytest.mark.sqlite("its trigger of the same table")
def test_a_key_that_is_not_what_was_written_stops_the_rotation(vault: Vault, store: Store) -> None:
    object_id = vault.put("records", b"a")
    version = vault.keyring.begin()
    # the database puts the genuine wrapping of another key in the place of each that is written
    kek = keys.unwrap(
        keys.derive(ROOT_KEY, "llmos/vault/tenant-keys/v1"),
        newest_tenant_key(store),
        f"{TENANT}|{version}".encode(),
    )
    other = keys.wrap(kek, bytes(32), f"{object_id}|records|{TENANT}|{version}".encode())
    with store.transaction() as conn:
        conn.exec_driver_sql("CREATE TABLE lie AS SELECT ? AS wrapped_key", (other,))
        conn.exec_driver_sql(
            "CREATE TRIGGER liar AFTER UPDATE ON object_keys BEGIN "
            "UPDATE object_keys SET wrapped_key = (SELECT wrapped_key FROM lie); END"
        )
    with pytest.raises(TamperedObject, match="not what was written"):
        vault.keyring.rewrap()
    with store.transaction() as conn:
        conn.exec_driver_sql("DROP TRIGGER liar")
    assert vault.read(object_id, "records", Everything()) == b"a"


def newest_tenant_key(store: Store) -> bytes:
    newest = select(tenant_keys.c.wrapped_key).order_by(tenant_keys.c.version.desc())
    with store.read() as conn:
        return bytes(conn.execute(newest.limit(1)).scalar_one())


def test_a_wrapped_key_is_bound_to_object_kind_tenant_and_version(
    vault: Vault, store: Store
) -> None:
    first, second = vault.put("records", b"1"), vault.put("records", b"2")
    whole = wrapped_keys(store)
    vault.keyring.begin()
    tampered: list[dict[str, object]] = [
        {"wrapped_key": whole[second]},
        {"key_version": 2},
        {"key_version": 0},
    ]
    with store.transaction() as conn:  # version 0 is there in older homes
        row = {"tenant": TENANT, "version": 0, "created_at": ""}
        conn.execute(tenant_keys.insert().values(row))
    this = object_keys.c.object_id == first
    for change in tampered:
        with store.transaction() as conn:
            conn.execute(update(object_keys).where(this).values(change))
        with pytest.raises(TamperedObject, match=first):
            vault.read(first, "records", Everything())
        with store.transaction() as conn:
            undo = {"wrapped_key": whole[first], "key_version": 1}
            conn.execute(update(object_keys).where(this).values(undo))
    with pytest.raises(TamperedObject, match="does not belong to this key and name"):
        vault.read(first, "canaries", Everything())
    assert vault.read(first, "records", Everything()) == b"1"


def test_tenant_keys_cannot_be_exchanged_or_lost_unseen(vault: Vault, store: Store) -> None:
    object_id = vault.put("records", b"1")
    vault.keyring.begin()
    with store.transaction() as conn:
        newest = select(tenant_keys.c.wrapped_key).where(tenant_keys.c.version == 2)
        swapped = conn.execute(newest).scalar_one()
        conn.execute(update(tenant_keys).filter_by(version=1).values(wrapped_key=swapped))
    with pytest.raises(TamperedObject, match=r"default\|1"):
        vault.read(object_id, "records", Everything())
    with store.transaction() as conn:
        conn.execute(update(tenant_keys).filter_by(version=1).values(wrapped_key=None))
    with pytest.raises(TamperedObject, match=r"default\|1"):
        vault.read(object_id, "records", Everything())
    # the database keeps a version that an object needs
    with pytest.raises(Exception, match=r"(?i)foreign key"), store.transaction() as conn:
        conn.execute(delete(tenant_keys).filter_by(version=1))


def test_the_root_key_is_not_kept_by_the_keyring(vault: Vault) -> None:
    assert ROOT_KEY not in vars(vault.keyring).values()


def make_old_keys(path: Path, objects: dict[str, bytes], secrets_: dict[str, bytes]) -> None:
    """Make keys.db as the first release did: object keys directly under a derived key."""
    with closing(sqlite3.connect(path)) as conn, conn:
        conn.execute("PRAGMA journal_mode = WAL")
        conn.executescript(
            """
            CREATE TABLE alembic_version (
                version_num VARCHAR(32) NOT NULL,
                CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
            );
            INSERT INTO alembic_version VALUES ('keys_0001');
            CREATE TABLE object_keys (
                object_id TEXT NOT NULL, kind TEXT NOT NULL, wrapped_key BLOB NOT NULL,
                created_at TEXT NOT NULL, PRIMARY KEY (object_id)
            );
            CREATE TABLE sealed_secrets (
                name TEXT NOT NULL, sealed BLOB NOT NULL, PRIMARY KEY (name)
            );
            """
        )
        kek = keys.derive(ROOT_KEY, "llmos/vault/object-keys/v1")
        conn.executemany(
            "INSERT INTO object_keys VALUES (?, 'records', ?, '2026-01-01T00:00:00.000Z')",
            [(id_, keys.wrap(kek, key, f"{id_}|records".encode())) for id_, key in objects.items()],
        )
        secret_kek = keys.derive(ROOT_KEY, "llmos/vault/secrets/v1")
        conn.executemany(
            "INSERT INTO sealed_secrets VALUES (?, ?)",
            [(n, keys.wrap(secret_kek, value, n.encode())) for n, value in secrets_.items()],
        )


def make_old_vault(home: Path, count: int) -> dict[str, bytes]:
    """Make a vault of the first release and return the plaintext of its objects."""
    from llmos.crypto import encryption

    object_keys_, plains = {}, {}
    for number in range(count):
        object_id = secrets.token_hex(16)
        object_keys_[object_id] = keys.generate_key()
        plains[object_id] = b"old %d" % number
        path = home / "objects" / object_id[:2] / object_id
        path.parent.mkdir(parents=True, exist_ok=True)
        context = f"{object_id}|records".encode()
        (home / "plain").write_bytes(plains[object_id])
        with (home / "plain").open("rb") as source, path.open("wb") as sink:
            encryption.encrypt(object_keys_[object_id], source, sink, context=context)
        (home / "plain").unlink()
    make_old_keys(home / "keys.db", object_keys_, {"pepper": b"hot"})
    return plains


@pytest.mark.sqlite("homes on PostgreSQL are younger")
def test_a_home_of_the_first_release_keeps_its_objects(tmp_path: Path) -> None:
    plains = make_old_vault(tmp_path, 3)
    with closing(open_store(tmp_path / "keys.db", KEYS)) as store:
        vault = Vault(tmp_path, store, ROOT_KEY)
        assert versions(store) == [(0, False, False, 3)]
        assert vault.secret("pepper") == b"hot"
        fresh = vault.put("records", b"new")  # under version 0, like those that are there
        for object_id, plain in {**plains, fresh: b"new"}.items():
            assert vault.read(object_id, "records", Everything()) == plain
        old = wrapped_keys(store)
        assert rotate(vault.keyring) == (1, 4, 1)
        assert versions(store) == [(0, False, True, 0), (1, True, False, 4)]
        for object_id, plain in {**plains, fresh: b"new"}.items():
            assert vault.read(object_id, "records", Everything()) == plain
        assert not any(wrapped in on_disk(tmp_path / "keys.db") for wrapped in old.values())


@pytest.mark.sqlite("homes on PostgreSQL are younger")
def test_an_empty_home_of_the_first_release_begins_with_version_1(tmp_path: Path) -> None:
    make_old_keys(tmp_path / "keys.db", {}, {})
    with closing(open_store(tmp_path / "keys.db", KEYS)) as store:
        assert versions(store) == []
        Vault(tmp_path, store, ROOT_KEY).put("records", b"a")
        assert versions(store) == [(1, True, False, 1)]


# Rotates the vault in argv[1], again and again from the same beginning, in children that are killed
# before their first, second, ... statement or commit, until one comes to its end. After every kill
# the vault is opened by the parent: all objects are read, and the rotation is finished.
KILLER = """
import os, shutil, signal, sys
from contextlib import closing
from pathlib import Path
from sqlalchemy import Engine, event
from llmos.kernel import keyring
from llmos.kernel.schema import KEYS
from llmos.kernel.vault import Vault
from tests.databases import open_store

keyring._BATCH_KEYS = 2
origin, objects = Path(sys.argv[1]), dict(pair.split("=") for pair in sys.argv[2:])

class Everything:
    def permits(self, object_id):
        return True

def opened(home):
    return closing(open_store(home / "keys.db", KEYS))

def rotate(home, store):
    ring = Vault(home, store, bytes(range(32))).keyring
    version = ring.begin()
    while ring.rewrap():
        pass
    return version, ring.retire()

def die_before(moment):
    moments = 0
    def count(*_arguments, **_named):
        nonlocal moments
        moments += 1
        if moments > moment:
            os.kill(os.getpid(), signal.SIGKILL)
    for name in ("before_cursor_execute", "commit"):
        event.listen(Engine, name, count)

kills, stages = 0, set()
while True:
    home = origin.with_name(f"copy{kills}")
    shutil.copytree(origin, home)
    child = os.fork()
    if child == 0:
        die_before(kills)
        with opened(home) as store:
            rotate(home, store)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
    kills += 1
    with opened(home) as store:
        vault = Vault(home, store, bytes(range(32)))
        def check():
            for object_id, plain in objects.items():
                assert vault.read(object_id, "records", Everything()) == plain.encode(), kills
        check()
        sql = "SELECT version, wrapped_key IS NULL, retired_at IS NULL FROM tenant_keys ORDER BY 1"
        with store.read() as conn:
            state = [tuple(row) for row in conn.exec_driver_sql(sql)]
            state += conn.exec_driver_sql(
                "SELECT key_version, count(*) FROM object_keys GROUP BY 1"
            ).all()
            stages.add(str(state))
        version, _ = rotate(home, store)
        check()
        with store.read() as conn:
            left = list(conn.exec_driver_sql("SELECT DISTINCT key_version FROM object_keys"))
            assert left == [(version,)], (kills, left)
            rows = list(map(tuple, conn.exec_driver_sql(sql)))
            assert all(row == (row[0], 1, 0) for row in rows[:-1]), (kills, rows)
            assert rows[-1] == (version, 0, 1)
    shutil.rmtree(home)
print(kills, len(stages))
"""


@pytest.mark.sqlite("its file is copied between the kills")
@pytest.mark.parametrize("old", [False, True], ids=["new home", "first release"])
def test_a_kill_at_any_moment_of_a_rotation_loses_no_object(tmp_path: Path, old: bool) -> None:
    home = tmp_path / "home"
    home.mkdir()
    if old:
        plains = make_old_vault(home, 3)
    else:
        with closing(open_store(home / "keys.db", KEYS)) as store:
            vault = Vault(home, store, ROOT_KEY)
            plains = {vault.put("records", b"new %d" % n): b"new %d" % n for n in range(3)}
    pairs = [f"{object_id}={plain.decode()}" for object_id, plain in plains.items()]
    run = subprocess.run(
        [sys.executable, *STRICT, "-c", KILLER, str(home), *pairs],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    kills, stages = map(int, run.stdout.split())
    assert kills > 40, "statements and commits of all stages"
    # before it, begun, one batch, both batches, the old key destroyed (version 0 has none)
    assert stages == (4 if old else 5)
