"""What is particular about PostgreSQL; what every database must do is in the kernel's tests."""

from __future__ import annotations

import secrets
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy import Connection, MetaData, NullPool, create_engine, insert, inspect, select, text
from sqlalchemy.exc import ProgrammingError
from tests.databases import (
    administrator,
    on_disk,
    open_store,
    outside,
    place,
    schemas,
    server_url,
)
from tests.postgresql import Server

from llmos import config as configuration
from llmos.databases import postgresql
from llmos.databases.postgresql import PostgreSQL, parse
from llmos.errors import ConfigError, IntegrityError, LlmosError, StorageError, StorageFull
from llmos.kernel import kernel as kernels
from llmos.kernel import schema
from llmos.kernel.store import Store
from llmos.transparency import log_inspection

pytestmark = pytest.mark.postgresql
SECRET = "hunter2"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(open_store(tmp_path / "kernel.db", schema.KERNEL, busy_timeout_s=30)) as store:
        yield store


@pytest.fixture
def home(tmp_path: Path) -> Path:
    kernel = kernels.create(configuration.load(home=tmp_path / "home"))
    kernel.store.close()
    kernel.vault._store.close()
    return tmp_path / "home"


def put(store: Store, name: str, value: str = "") -> None:
    with store.transaction() as conn:
        conn.execute(insert(schema.settings).values(name=name, value=value))


def names(store: Store) -> list[str]:
    with store.read() as conn:
        return list(conn.execute(select(schema.settings.c.name)).scalars())


def tables(conn: Connection) -> dict[str, Any]:
    """Return all that the tables of the schema are, but not what their constraints are called."""
    found = inspect(conn)
    facts = {}
    for name in set(found.get_table_names()) - {"alembic_version"}:
        facts[name] = {
            "columns": [
                (c["name"], str(c["type"]).split(" ")[0], c["nullable"], str(c["default"]))
                for c in found.get_columns(name)
            ],
            "key": found.get_pk_constraint(name)["constrained_columns"],
            "unique": sorted(u["column_names"] for u in found.get_unique_constraints(name)),
            "checks": sorted((c["name"], c["sqltext"]) for c in found.get_check_constraints(name)),
            "foreign": sorted(
                (f["constrained_columns"], f["referred_table"], f["referred_columns"])
                for f in found.get_foreign_keys(name)
            ),
        }
    return facts


@pytest.mark.parametrize("metadata", [schema.KERNEL, schema.KEYS])
def test_migrations_make_the_tables_of_the_schema_and_compare_texts_bytewise(
    metadata: MetaData, tmp_path: Path
) -> None:
    declared = place(tmp_path / "declared.db")
    assert isinstance(declared, PostgreSQL)
    engine = declared.engine(metadata, 60.0)
    metadata.create_all(engine)
    with (
        closing(open_store(tmp_path / "migrated.db", metadata)) as store,
        store.read() as conn,
        engine.connect() as other,
    ):
        migrated = tables(conn)
        for name, facts in tables(other).items():
            assert str(migrated[name]) == str(facts), name
        assert set(metadata.tables) <= set(migrated)
        collations = conn.exec_driver_sql(
            "SELECT DISTINCT collation_name FROM information_schema.columns "
            "WHERE table_schema = current_schema() AND data_type = 'text'"
        ).scalars()
        assert list(collations) == ["C"]
    engine.dispose()


def test_commits_are_durable_whatever_the_role_was_given(tmp_path: Path) -> None:
    with administrator() as conn:
        conn.execute(text("ALTER ROLE llmos SET synchronous_commit = off"))
    try:
        with (
            closing(open_store(tmp_path / "kernel.db", schema.KERNEL)) as store,
            store.transaction() as conn,
        ):
            found = [
                conn.exec_driver_sql(f"SHOW {name}").scalar_one()
                for name in ("synchronous_commit", "lock_timeout", "client_encoding")
            ]
    finally:
        with administrator() as conn:
            conn.execute(text("ALTER ROLE llmos RESET synchronous_commit"))
    assert found == ["on", "1min", "UTF8"]


def test_a_writer_that_waited_sees_all_that_was_written_meanwhile(store: Store) -> None:
    """With a snapshot as old as the beginning of its wait it would count from an old number."""
    put(store, "counter", "0")
    counter = schema.settings.c.name == "counter"

    def count() -> None:
        with store.transaction() as conn:
            value = conn.execute(select(schema.settings.c.value).where(counter)).scalar_one()
            conn.execute(schema.settings.update().where(counter).values(value=str(int(value) + 1)))

    threads = [threading.Thread(target=count) for _ in range(4)]
    with store.transaction() as conn:
        for thread in threads:
            thread.start()
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        while conn.exec_driver_sql(waiting).scalar_one() < len(threads):
            pass
        conn.execute(schema.settings.update().where(counter).values(value="10"))
    for thread in threads:
        thread.join()
    with store.read() as conn:
        assert conn.execute(select(schema.settings.c.value).where(counter)).scalar_one() == "14"


def test_homes_in_one_database_do_not_wait_for_each_other(store: Store, tmp_path: Path) -> None:
    with (
        closing(open_store(tmp_path / "other.db", schema.KERNEL, busy_timeout_s=0.2)) as other,
        store.transaction() as conn,
    ):
        conn.execute(insert(schema.settings).values(name="a", value=""))
        put(other, "b")
        assert names(other) == ["b"]
    assert names(store) == ["a"]


def test_a_full_disk_is_said_so_and_changes_nothing(store: Store) -> None:
    def fill() -> None:
        with store.transaction() as conn:
            conn.execute(insert(schema.settings).values(name="a", value=""))
            conn.exec_driver_sql("DO $$ BEGIN RAISE disk_full; END $$")

    with pytest.raises(StorageFull, match="no room left on the server's device"):
        fill()
    assert names(store) == []


def test_wrong_statements_are_not_disguised_as_faults_of_the_server(store: Store) -> None:
    with pytest.raises(ProgrammingError, match="nowhere"), store.read() as conn:
        conn.exec_driver_sql("SELECT * FROM nowhere")
    database = store.database
    assert isinstance(database, PostgreSQL)
    with pytest.raises(ProgrammingError, match="nowhere"):
        database.run("SELECT * FROM nowhere")
    with pytest.raises(ProgrammingError, match="placeholders"), store.read() as conn:
        conn.exec_driver_sql("SELECT 1", ("too much",))


def test_a_stopped_server_is_a_storage_error_and_a_started_one_is_used_again(
    store: Store, postgresql_server: Server
) -> None:
    put(store, "before")
    postgresql_server.stop("immediate")
    try:
        with pytest.raises(StorageError, match="connection") as refused:
            put(store, "a")
        assert "LLMOS_DATABASE_URL" in refused.value.hint
    finally:
        postgresql_server.start()
    put(store, "after")  # through the pool that had connections to the server before
    assert names(store) == ["before", "after"]


def test_a_connection_that_is_lost_in_a_transaction_leaves_nothing_of_it(store: Store) -> None:
    def lose() -> None:
        with store.transaction() as conn:
            conn.execute(insert(schema.settings).values(name="half", value=""))
            number = conn.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
            with administrator() as stronger:
                stronger.execute(text("SELECT pg_terminate_backend(:n)"), {"n": number})
            conn.execute(insert(schema.settings).values(name="other half", value=""))

    with pytest.raises(StorageError, match=r"terminating connection|connection is lost|closed"):
        lose()
    put(store, "after")
    assert names(store) == ["after"]


def test_a_destroyed_key_leaves_the_files_of_the_tables(tmp_path: Path) -> None:
    secret = bytes(range(65, 97)) * 2
    path = tmp_path / "keys.db"
    with closing(open_store(path, schema.KEYS, busy_timeout_s=0.2)) as keys:
        with keys.transaction() as conn:
            conn.execute(insert(schema.sealed_secrets).values(name="a", sealed=secret))
        assert secret in on_disk(path)
        with keys.read() as reader:
            assert reader.execute(select(schema.object_keys)).all() == []  # takes its snapshot
            with keys.transaction() as conn:
                conn.execute(schema.sealed_secrets.delete())
            with pytest.raises(StorageError, match="someone is reading"):
                keys.checkpoint()
            assert secret in on_disk(path)
        keys.checkpoint()
    assert secret not in on_disk(path)


def test_what_can_hold_back_no_row_is_not_waited_for(tmp_path: Path, store: Store) -> None:
    with (
        closing(open_store(tmp_path / "keys.db", schema.KEYS, busy_timeout_s=0.2)) as keys,
        store.transaction(),  # it has the writers' lock, but has neither read nor written
    ):
        keys.checkpoint()


def test_a_table_that_is_locked_is_a_busy_database(tmp_path: Path) -> None:
    database = place(tmp_path / "keys.db")
    assert isinstance(database, PostgreSQL)
    with closing(open_store(tmp_path / "keys.db", schema.KEYS, busy_timeout_s=0.2)) as keys:
        engine = database.engine(schema.KEYS, 60)
        with engine.begin() as conn:
            conn.exec_driver_sql("LOCK TABLE object_keys")
            conn.exec_driver_sql("SAVEPOINT a")  # no snapshot is kept
            with pytest.raises(StorageError):
                keys.checkpoint()
        engine.dispose()


def test_a_locked_name_is_free_although_the_server_has_not_noticed_the_closed_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = place(tmp_path / "one.db")
    assert isinstance(one, PostgreSQL)
    closing_late: list[psycopg.Connection[Any]] = []

    def close_later(connection: psycopg.Connection[Any]) -> None:
        closing_late.append(connection)

    monkeypatch.setattr(psycopg.Connection, "close", close_later)
    for _ in range(3):
        with one.locked("name") as locked:
            assert locked
        assert not one.is_locked("name")
    monkeypatch.undo()
    assert len(closing_late) >= 3
    for connection in closing_late:
        connection.close()


def test_a_locked_name_is_free_when_its_block_ends_and_in_another_schema(tmp_path: Path) -> None:
    one, other = place(tmp_path / "one.db"), place(tmp_path / "other.db")
    assert isinstance(one, PostgreSQL)
    assert isinstance(other, PostgreSQL)
    with one.locked("name") as first, one.locked("name") as second, other.locked("name") as third:
        assert (first, second, third) == (True, False, True)
        assert one.is_locked("name")
        assert not one.is_locked("another name")


@pytest.mark.parametrize(
    "url",
    [
        f"sqlite:///{SECRET}",
        f"mysql://me:{SECRET}@host/db",
        f"postgresql://me:1@{SECRET}@host/db",
        f"{SECRET}",
        "",
    ],
)
def test_an_unusable_url_is_refused_and_quoted_nowhere(
    url: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMOS_DATABASE_URL", url)
    config = configuration.load(home=home)
    with pytest.raises(ConfigError, match="is no URL like postgresql://") as refused:
        kernels.open_kernel(config)
    assert "%40" in refused.value.hint
    said = "".join(traceback.format_exception(refused.value)) + repr(config) + str(config)
    assert SECRET not in said


def test_the_password_is_in_no_message_of_a_refused_connection(home: Path) -> None:
    url = server_url()
    assert url is not None
    wrong = url.get_secret_value().replace("llmos@/llmos", f"nobody:{SECRET}@/nowhere")
    config = configuration.load(home=home, database_url=wrong)
    with pytest.raises(StorageError, match="nobody") as refused:
        kernels.open_kernel(config)
    said = "".join(traceback.format_exception(refused.value)) + repr(kernels.locate(config, "keys"))
    assert SECRET not in said
    assert SECRET not in repr(config)


def test_over_the_network_the_server_must_prove_its_name_unless_the_url_says_otherwise() -> None:
    assert parse(SecretStr("postgresql://me@db.example/llmos")).query == {"sslmode": "verify-full"}
    weaker = parse(SecretStr("postgresql://me@db.example/llmos?sslmode=disable&port=1"))
    assert weaker.query == {"sslmode": "disable", "port": "1"}
    assert weaker.drivername == "postgresql+psycopg"


def test_without_psycopg_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgresql, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="psycopg is not installed") as refused:
        parse(SecretStr("postgresql://me@host/db"))
    assert refused.value.hint == "pip install 'llmos[postgres]'"


def test_a_home_is_made_on_the_server_and_found_again(home: Path) -> None:
    prefix = (home / "schema").read_text().strip()
    assert {f"{prefix}_kernel", f"{prefix}_keys"} <= set(schemas())
    assert not list(home.glob("*.db*"))
    assert (home / "schema").stat().st_mode & 0o777 == 0o600
    with outside(home) as conn:
        assert conn.execute(text("SELECT count(*) FROM log_entries")).scalar_one() == 1


def test_a_home_that_cannot_be_finished_leaves_no_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = schemas()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    config = configuration.load(home=tmp_path / "home")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)  # the last act, when all else is there
        with pytest.raises(StorageFull):
            kernels.create(config)
    assert schemas() == before
    assert list(tmp_path.iterdir()) == []


def test_a_role_that_may_make_no_schema_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    before = schemas()
    with administrator() as conn:
        conn.execute(text("REVOKE CREATE ON DATABASE llmos FROM llmos"))
    try:
        with pytest.raises(StorageError, match="permission denied"):
            kernels.create(configuration.load(home=tmp_path / "home"))
    finally:
        with administrator() as conn:
            conn.execute(text("GRANT CREATE ON DATABASE llmos TO llmos"))
    assert schemas() == before
    assert list(tmp_path.iterdir()) == []


def test_a_schema_that_is_there_is_never_taken_over(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = (home / "schema").read_text().strip()
    monkeypatch.setattr(secrets, "token_hex", lambda _n: prefix.removeprefix("llmos_"))
    before = schemas()
    url = server_url()
    assert url is not None
    with pytest.raises(StorageError, match="already exists"), ExitStack() as undo:
        postgresql.create(url, tmp_path / "schema", undo)
    assert schemas() == before
    kernels.open_kernel(configuration.load(home=home)).store.close()


def test_a_home_and_the_setting_must_go_together(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name for path in home.iterdir()}
    with monkeypatch.context() as patch:
        patch.delenv("LLMOS_DATABASE_URL")
        with pytest.raises(ConfigError, match="on PostgreSQL") as refused:
            kernels.open_kernel(configuration.load(home=home))
        assert refused.value.hint == "set LLMOS_DATABASE_URL"
        kernels.create(configuration.load(home=tmp_path / "files")).store.close()
    assert {path.name for path in home.iterdir()} == before
    known = schemas()
    with pytest.raises(ConfigError, match="are its own files") as refused:
        kernels.open_kernel(configuration.load(home=tmp_path / "files"))
    assert refused.value.hint == "unset LLMOS_DATABASE_URL"
    assert schemas() == known


@pytest.mark.parametrize("name", [b"", b"llmos_0123", b"public", b"llmos_0123456789abcdef; --"])
def test_a_damaged_name_of_the_schema_is_refused(home: Path, name: bytes) -> None:
    (home / "schema").write_bytes(name)
    with pytest.raises(IntegrityError, match="schema is damaged"):
        kernels.open_kernel(configuration.load(home=home))


def test_a_database_without_the_homes_schema_is_refused_and_stays_empty(home: Path) -> None:
    (home / "schema").write_text("llmos_0123456789abcdef\n")
    before = schemas()
    with pytest.raises(LlmosError, match="llmos_0123456789abcdef_kernel: no schema"):
        kernels.open_kernel(configuration.load(home=home))
    assert schemas() == before


def test_a_log_is_inspected_where_it_is(home: Path) -> None:
    database = kernels.locate(configuration.load(home=home), "kernel")
    assert isinstance(database, PostgreSQL)
    sound = log_inspection.inspect(home, database)
    assert (sound.entries, sound.signature_checked, sound.differences) == (1, True, ())
    with outside(home) as conn:
        conn.execute(text("UPDATE log_entries SET data = 'other'"))
        conn.execute(text("INSERT INTO log_nodes SELECT 3, 0, hash FROM log_nodes"))
    changed = log_inspection.inspect(home, database)
    assert {difference.where for difference in changed.differences} == {
        *("entry 0", "checkpoint of 1 entries", "hash of level 3, place 0"),
    }
    with outside(home) as conn:
        conn.execute(text("DROP TABLE log_nodes"))
    (missing,) = log_inspection.inspect(home, database).differences
    assert "cannot be read as a database" in missing.what
    assert "log_nodes" in missing.what
    with outside(home) as conn:
        conn.execute(text("ALTER TABLE log_entries OWNER TO postgres"))
    with pytest.raises(StorageError, match="permission denied") as refused:
        log_inspection.inspect(home, database)
    assert database.schema in refused.value.message


def test_a_snapshot_cannot_write_and_needs_a_server(store: Store) -> None:
    database = store.database
    assert isinstance(database, PostgreSQL)
    with pytest.raises(Exception, match="read-only"), database.snapshot() as conn:
        conn.exec_driver_sql("INSERT INTO settings VALUES ('a', 'b')")
    nowhere = PostgreSQL(database.url.set(query={"host": "/nowhere"}), database.schema)
    with pytest.raises(StorageError, match="nowhere"), nowhere.snapshot():
        pytest.fail("there is no server")


def test_transactions_of_other_roles_are_waited_for_too(tmp_path: Path) -> None:
    url = server_url()
    assert url is not None
    engine = create_engine(parse(url).set(username="postgres"), poolclass=NullPool)
    with (
        closing(open_store(tmp_path / "keys.db", schema.KEYS, busy_timeout_s=0.2)) as keys,
        engine.connect() as other,
    ):
        other.execute(text("SELECT 1"))
        with pytest.raises(StorageError, match="someone is reading"):
            keys.checkpoint()
        other.rollback()
        keys.checkpoint()


def test_autovacuum_is_waited_for_while_it_analyzes(tmp_path: Path) -> None:
    """Its snapshot would let `VACUUM FULL` keep the deleted row; here it analyzes for seconds."""
    url = server_url()
    assert url is not None
    server = create_engine(parse(url).set(username="postgres"), isolation_level="AUTOCOMMIT")
    with ExitStack() as at_the_end:
        keys = at_the_end.enter_context(
            closing(open_store(tmp_path / "keys.db", schema.KEYS, busy_timeout_s=0.2))
        )
        at_the_end.callback(server.dispose)
        superuser = at_the_end.enter_context(server.connect())

        def run(statement: str) -> Any:
            rows = superuser.exec_driver_sql(statement)
            return rows.scalar() if rows.returns_rows else None

        at_the_end.callback(run, "DROP SCHEMA slow CASCADE")
        run(
            "CREATE SCHEMA slow; CREATE TABLE slow.switch (seconds float8);"
            "INSERT INTO slow.switch VALUES (0); CREATE TABLE slow.numbers (n int);"
            "CREATE FUNCTION slow.wait(n int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS "
            "$$ BEGIN PERFORM pg_sleep(seconds) FROM slow.switch; RETURN n; END $$;"
            "CREATE INDEX ON slow.numbers (slow.wait(n));"  # analyzing evaluates it for each row
            "INSERT INTO slow.numbers SELECT generate_series(1, 100);"
            "UPDATE slow.switch SET seconds = 0.05"
        )
        at_the_end.callback(run, "SELECT pg_reload_conf()")
        at_the_end.callback(run, "ALTER SYSTEM RESET autovacuum_naptime")
        run("ALTER SYSTEM SET autovacuum_naptime = 1")
        run("SELECT pg_reload_conf()")
        at_work = "FROM pg_stat_activity WHERE backend_type = 'autovacuum worker'"
        analyzing = (
            f"SELECT count(*) {at_work} AND query ~ 'ANALYZE slow' AND backend_xmin::text > '0'"
        )
        deadline = time.monotonic() + 60
        while not run(analyzing):
            assert time.monotonic() < deadline, "autovacuum does not come"
            time.sleep(0.05)
        with pytest.raises(StorageError, match="someone is reading"):
            keys.checkpoint()
        assert run(analyzing)  # so it was this
        run("UPDATE slow.switch SET seconds = 0")
        run(f"SELECT pg_terminate_backend(pid) {at_work}")
        keys.checkpoint()
