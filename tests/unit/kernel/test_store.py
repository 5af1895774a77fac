from __future__ import annotations

import fcntl
import logging
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import MetaData, create_engine, insert, select, update
from sqlalchemy.exc import IntegrityError, OperationalError
from tests.databases import STRICT, open_store

import llmos
from llmos.errors import StorageError, StorageFull
from llmos.jobs.tables import job_steps, jobs
from llmos.kernel import migrations, schema
from llmos.kernel.budget import Balance, Budget
from llmos.kernel.store import Store, now, timestamp
from llmos.models.tables import models
from llmos.privacy import PoissonSampledGaussian

pytestmark = pytest.mark.databases

OPEN = """
import atexit, sys
from pathlib import Path
from sqlalchemy import insert, select, update
from llmos.kernel import schema
from tests.databases import open_store
print("ready", flush=True)
sys.stdin.readline()
store = open_store(Path(sys.argv[1]), schema.KERNEL)
atexit.register(store.close)
counter = schema.settings.c.name == "counter"
"""
COUNT = """
for _ in range(int(sys.argv[2])):
    with store.transaction() as conn:
        value = conn.execute(select(schema.settings.c.value).where(counter)).scalar_one()
        conn.execute(update(schema.settings).where(counter).values(value=str(int(value) + 1)))
"""
HANG = """
with store.transaction() as conn:
    conn.execute(insert(schema.settings).values(name="half", value="done"))
    print("written", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = open_store(tmp_path / "kernel.db", schema.KERNEL, busy_timeout_s=30)
    yield store
    store.close()


def process(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *STRICT, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def go(*workers: subprocess.Popen[str]) -> None:
    """Let processes that have loaded everything begin at one moment."""
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()


def put(store: Store, name: str, value: str = "") -> None:
    with store.transaction() as conn:
        conn.execute(insert(schema.settings).values(name=name, value=value))


def names(store: Store) -> list[str]:
    with store.read() as conn:
        return list(conn.execute(select(schema.settings.c.name)).scalars())


def statements(connection: sqlite3.Connection) -> dict[str, str]:
    rows = connection.execute(
        "SELECT name, sql FROM sqlite_master WHERE type IN ('table', 'index') AND sql IS NOT NULL "
        "AND name NOT IN ('alembic_version', 'sqlite_sequence')"
    )
    return {name: re.sub(r"[\s\"]+", " ", sql).strip() for name, sql in rows}


@pytest.mark.sqlite("compares SQLite's own texts")
@pytest.mark.parametrize("metadata", [schema.KERNEL, schema.KEYS])
def test_migrations_make_exactly_the_tables_of_the_schema(
    metadata: MetaData, tmp_path: Path
) -> None:
    for tables in Path(llmos.__file__).parent.glob("*/tables.py"):
        import_module(f"llmos.{tables.parent.name}.tables")
    open_store(tmp_path / "migrated.db", metadata).close()
    engine = create_engine(f"sqlite:///{tmp_path / 'declared.db'}")
    metadata.create_all(engine)
    engine.dispose()
    with (
        closing(sqlite3.connect(tmp_path / "migrated.db")) as migrated,
        closing(sqlite3.connect(tmp_path / "declared.db")) as declared,
    ):
        assert statements(migrated) == statements(declared)


@pytest.mark.sqlite("homes on PostgreSQL are younger")
def test_a_database_of_the_first_schema_keeps_its_jobs_and_gets_the_number_of_their_runs(
    tmp_path: Path,
) -> None:
    path = tmp_path / "kernel.db"
    old = (
        "INSERT INTO jobs (id, kind, principal, request, state, cancel_requested, created_at, "
        "updated_at) VALUES ('train-1', 'train', 'erin', '{}', 'running', 0, '', '')"
    )
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as conn:
        config.attributes["connection"] = conn
        command.upgrade(config, "kernel_0001")
        conn.exec_driver_sql(old)
    engine.dispose()
    with closing(open_store(path, schema.KERNEL)) as store, store.read() as conn:
        found = conn.execute(select(jobs.c.id, jobs.c.attempt)).all()
        assert found == [("train-1", 0)]
        assert conn.execute(select(job_steps)).all() == []


@pytest.mark.sqlite("homes on PostgreSQL are younger")
def test_a_ledger_of_the_first_schema_is_carried_over(tmp_path: Path) -> None:
    job = PoissonSampledGaussian(0.1, 1.5, 7)
    with closing(sqlite3.connect(tmp_path / "kernel.db")) as old:
        old.executescript(
            (Path(__file__).parents[2] / "vectors" / "kernel_0001_ledger.sql").read_text()
        )
    with closing(open_store(tmp_path / "kernel.db", schema.KERNEL)) as store:
        budget = Budget(store)
        pool = budget.pool("notes")
        assert pool.balance == Balance(cap=9000, spent=40, held=300) == budget.recompute("notes")
        assert (pool.epsilon, pool.purpose) == (3.0, None)
        done, held = budget.reservations("notes")
        assert (done.id, done.costs, done.purpose) == ("train-1", {"notes": 40}, "training")
        assert (held.id, held.state, held.mechanism) == ("train-2", "held", job)
        with store.transaction() as conn:
            budget.commit(conn, "train-2", job.after(0))
        assert budget.recompute("notes") == Balance(9000, 40, 0) == budget.pool("notes").balance
        with pytest.raises(IntegrityError, match="append-only"), store.transaction() as conn:
            conn.execute(schema.budget_events.delete())


def test_each_database_has_one_line_of_revisions() -> None:
    script = ScriptDirectory(str(Path(migrations.__file__).parent))
    heads = sorted(script.get_heads())
    assert [head.split("_")[0] for head in heads] == ["kernel", "keys"]
    assert {revision.revision for revision in script.walk_revisions()} == {
        file.stem for file in Path(migrations.__file__).parent.glob("versions/*_*.py")
    } - {"__init__"}


@pytest.mark.sqlite("its settings")
def test_connections_are_durable_and_check_foreign_keys(store: Store) -> None:
    with store.read() as conn:
        found = {
            name: conn.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert found == {
        "journal_mode": "wal",
        "synchronous": 2,  # FULL
        "foreign_keys": 1,
        "busy_timeout": 30_000,
    }
    with pytest.raises(IntegrityError, match="FOREIGN KEY"), store.transaction() as conn:
        conn.execute(
            insert(models).values(
                name="a", kind="adapter", base="nobody", location="", digest="", card="{}",
                created_at=now(),
            )
        )  # fmt: skip


@pytest.mark.sqlite("its files")
def test_only_the_owner_can_read_the_files(store: Store, tmp_path: Path) -> None:
    put(store, "a")
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert modes == {"kernel.db": 0o600, "kernel.db-wal": 0o600, "kernel.db-shm": 0o600}


def test_opening_again_keeps_everything_and_does_not_load_alembic(
    store: Store, tmp_path: Path
) -> None:
    put(store, "kept")
    reopened = process(OPEN + "print('alembic' in sys.modules)", tmp_path / "kernel.db")
    go(reopened)
    assert reopened.communicate() == ("False\n", "")
    store.migrate()
    assert names(store) == ["kept"]


def test_migration_is_quiet_and_leaves_logging_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    before = (root.level, list(root.handlers), logging.getLogger("alembic").level)
    open_store(tmp_path / "kernel.db", schema.KERNEL).close()
    assert (root.level, list(root.handlers), logging.getLogger("alembic").level) == before
    assert capfd.readouterr() == ("", "")


def test_transaction_keeps_all_or_nothing(store: Store) -> None:
    put(store, "a")

    def put_and_fail() -> None:
        with store.transaction() as conn:
            conn.execute(insert(schema.settings).values(name="b", value=""))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        put_and_fail()
    assert names(store) == ["a"]


def test_transaction_inside_another_is_refused_at_once(store: Store) -> None:
    with pytest.raises(StorageError, match="inside another"), store.transaction():
        put(store, "inner")
    put(store, "after")
    assert names(store) == ["after"]


def test_two_stores_may_be_written_together(store: Store, tmp_path: Path) -> None:
    with (
        closing(open_store(tmp_path / "keys.db", schema.KEYS)) as keys,
        store.transaction() as conn,
    ):
        conn.execute(insert(schema.settings).values(name="a", value=""))
        with keys.transaction() as inner:
            inner.execute(insert(schema.sealed_secrets).values(name="a", sealed=b""))
    assert names(store) == ["a"]


def test_threads_take_turns(store: Store) -> None:
    threads = [threading.Thread(target=put, args=(store, f"{i:02}")) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(names(store)) == [f"{i:02}" for i in range(24)]


def test_reading_sees_one_moment_and_does_not_wait_for_a_writer(store: Store) -> None:
    put(store, "a")
    with store.read() as conn:
        query = select(schema.settings.c.name)
        assert conn.execute(query).scalars().all() == ["a"]
        writer = threading.Thread(target=put, args=(store, "b"))
        writer.start()
        writer.join()
        assert conn.execute(query).scalars().all() == ["a"]
    assert names(store) == ["a", "b"]


def test_reading_cannot_write_and_writing_can_afterwards(store: Store) -> None:
    with pytest.raises(StorageError, match=r"read-?only"), store.read() as conn:
        conn.execute(insert(schema.settings).values(name="a", value=""))
    put(store, "b")  # on the same pooled connection
    assert names(store) == ["b"]


def test_processes_wait_for_each_other_and_none_fails(store: Store, tmp_path: Path) -> None:
    put(store, "counter", "0")
    workers = [process(OPEN + COUNT, tmp_path / "kernel.db", 60) for _ in range(4)]
    go(*workers)
    assert [worker.communicate() for worker in workers] == [("", "")] * 4
    with store.read() as conn:
        assert conn.execute(select(schema.settings.c.value)).scalar_one() == "240"


def test_processes_make_a_new_database_together(tmp_path: Path) -> None:
    path = tmp_path / "kernel.db"
    put_own = "with store.transaction() as conn:\n"
    put_own += "    conn.execute(insert(schema.settings).values(name=sys.argv[2], value=''))\n"
    workers = [process(OPEN + put_own, path, number) for number in range(5)]
    go(*workers)
    assert [worker.communicate() for worker in workers] == [("", "")] * 5
    with closing(open_store(path, schema.KERNEL)) as store:
        assert sorted(names(store)) == ["0", "1", "2", "3", "4"]


@pytest.mark.sqlite("its lock")
def test_the_schema_is_looked_at_and_changed_under_the_folders_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []

    def is_locked() -> bool:
        descriptor = os.open(tmp_path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    for name in ("_is_current", "transaction"):
        original = getattr(Store, name)

        def watched(store: Store, name: str = name, original: Any = original) -> Any:
            assert is_locked()
            looked.append(name)
            return original(store)

        monkeypatch.setattr(Store, name, watched)
    open_store(tmp_path / "kernel.db", schema.KERNEL).close()
    assert looked == ["_is_current", "transaction"]
    assert not is_locked()


def test_a_killed_process_leaves_no_half_transaction_and_no_lock(
    store: Store, tmp_path: Path
) -> None:
    worker = process(OPEN + HANG, tmp_path / "kernel.db")
    go(worker)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "written\n"
    worker.kill()
    worker.communicate()
    put(store, "after")
    assert names(store) == ["after"]


@pytest.mark.sqlite("its limit of pages")
def test_a_full_disk_is_said_so_and_changes_nothing(store: Store) -> None:
    put(store, "before")

    def fill() -> None:
        with store.transaction() as conn:
            pages = conn.exec_driver_sql("PRAGMA page_count").scalar_one()
            conn.exec_driver_sql(f"PRAGMA max_page_count = {pages}")  # SQLite's own full disk
            conn.execute(insert(schema.settings).values(name="b", value="x" * 100_000))

    with pytest.raises(StorageFull, match="no room left") as caught:
        fill()
    assert caught.value.hint
    assert names(store) == ["before"]


def test_a_writer_that_never_ends_is_given_up_after_the_timeout(tmp_path: Path) -> None:
    path = tmp_path / "kernel.db"
    with (
        closing(open_store(path, schema.KERNEL)) as holder,
        closing(open_store(path, schema.KERNEL, busy_timeout_s=0.01)) as impatient,
        holder.transaction(),
        pytest.raises(StorageError, match="kept busy") as caught,
    ):
        put(impatient, "a")
    assert "LLMOS_BUSY_TIMEOUT_S" in caught.value.hint


@pytest.mark.sqlite("its messages")
def test_wrong_statements_are_not_disguised_as_disk_faults(store: Store) -> None:
    with pytest.raises(OperationalError, match="syntax error"), store.read() as conn:
        conn.exec_driver_sql("SELEKT 1")
    put(store, "a")
    with pytest.raises(IntegrityError, match="UNIQUE"):
        put(store, "a")


@pytest.mark.sqlite("its file")
def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kernel.db").write_bytes(b"no database at all" * 1000)
    with pytest.raises(StorageError, match="not a database"):
        open_store(tmp_path / "kernel.db", schema.KERNEL)


def test_a_database_of_newer_code_is_refused(store: Store, tmp_path: Path) -> None:
    with store.transaction() as conn:
        conn.exec_driver_sql("UPDATE alembic_version SET version_num = 'kernel_9999'")
    with pytest.raises(StorageError, match=r"newer LLMOS.*kernel_9999.*kernel_\d"):
        open_store(tmp_path / "kernel.db", schema.KERNEL)


def test_a_database_of_the_other_kind_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="kernel_"):
        open_store(tmp_path / "kernel.db", schema.KEYS)


@pytest.mark.sqlite("its file")
def test_a_missing_folder_and_an_impossible_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be opened"):
        open_store(tmp_path / "nowhere" / "kernel.db", schema.KERNEL)
    with pytest.raises(StorageError, match="cannot be made"):
        open_store(tmp_path / ("x" * 300), schema.KERNEL)


@pytest.mark.sqlite("its file")
def test_names_with_signs_are_only_names(tmp_path: Path) -> None:
    folder = tmp_path / "a b?mode=ro#%41"
    folder.mkdir()
    with closing(open_store(folder / "kernel.db", schema.KERNEL)) as store:
        put(store, "a")
        assert names(store) == ["a"]
    assert (folder / "kernel.db").exists()


@pytest.mark.sqlite("its file")
def test_a_destroyed_key_leaves_the_disk(tmp_path: Path) -> None:
    secret = bytes(range(65, 97)) * 2
    with closing(open_store(tmp_path / "keys.db", schema.KEYS)) as keys:
        with keys.read() as conn:  # some builds of SQLite have it on without being asked
            assert conn.exec_driver_sql("PRAGMA secure_delete").scalar_one() == 1
        with keys.transaction() as conn:
            conn.execute(insert(schema.sealed_secrets).values(name="a", sealed=secret))
        on_disk = b"".join(file.read_bytes() for file in tmp_path.iterdir())
        assert secret in on_disk
        with keys.transaction() as conn:
            conn.execute(schema.sealed_secrets.delete())
        keys.checkpoint()
        on_disk = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert secret not in on_disk


@pytest.mark.sqlite("its write-ahead log")
def test_checkpoint_says_when_a_reader_is_in_the_way(tmp_path: Path) -> None:
    with closing(open_store(tmp_path / "k.db", schema.KERNEL, busy_timeout_s=0.01)) as store:
        put(store, "a")
        with store.read() as conn:
            conn.execute(select(schema.settings)).all()
            put_aside = threading.Thread(target=put, args=(store, "b"))
            put_aside.start()
            put_aside.join()
            with pytest.raises(StorageError, match="someone is reading"):
                store.checkpoint()
        store.checkpoint()
        assert (tmp_path / "k.db-wal").stat().st_size == 0


def test_events_of_the_budget_are_append_only(store: Store) -> None:
    with store.transaction() as conn:
        conn.exec_driver_sql(
            "INSERT INTO datasets VALUES "
            "('d', 'sensitive', '[]', 'id', '', '', '{}', '', '[]', NULL)"
        )
        conn.exec_driver_sql(
            "INSERT INTO budget_pools VALUES "
            "('d', 'd', NULL, '', '', '', 'id', '', '', 9, 0, 0, NULL)"
        )
        conn.exec_driver_sql(
            "INSERT INTO budget_events VALUES (1, 'd', 'reserve', 'r', '', 0, 1, 0, '')"
        )
    events = schema.budget_events
    for statement in (update(events).values(held_change=0), events.delete()):
        with pytest.raises(IntegrityError, match="append-only"), store.transaction() as conn:
            conn.execute(statement)


def test_times_are_utc_text_that_sorts() -> None:
    east = datetime(2026, 1, 1, 8, 0, tzinfo=timezone(timedelta(hours=8)))
    assert timestamp(east) == "2026-01-01T00:00:00.000Z"
    assert timestamp(east + timedelta(milliseconds=1)) > timestamp(east)
    read_back = datetime.fromisoformat(now())
    assert abs(read_back - datetime.now(UTC)) < timedelta(minutes=1)


@pytest.mark.sqlite("what SQLite stores and PostgreSQL refuses")
def test_rows_that_cannot_be_read_are_a_fault_of_the_file(store: Store) -> None:
    put(store, "a")
    with pytest.raises(StorageError, match="no such column"), store.read() as conn:
        conn.exec_driver_sql("SELECT absent FROM settings")
    with store.transaction() as conn:
        conn.exec_driver_sql("UPDATE settings SET value = CAST(x'ff' AS TEXT)")
    with pytest.raises(StorageError, match="UTF-8"), store.read() as conn:
        conn.exec_driver_sql("SELECT * FROM settings").all()
    with pytest.raises(StorageError, match="invalid literal"), store.read():
        int("what a row holds")


def test_checkpoint_says_what_is_wrong_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.db"
    with closing(Store.open(path, schema.KEYS)) as store:
        store.close()
        path.write_bytes(b"not a database " * 1000)
        with pytest.raises(StorageError, match="not a database") as refused:
            store.checkpoint()
    assert "llmos doctor" in refused.value.hint


def test_a_writer_that_does_not_wait_gives_up_at_once_and_others_still_wait(tmp_path: Path) -> None:
    with (
        closing(Store.open(tmp_path / "kernel.db", schema.KERNEL)) as one,
        closing(Store.open(tmp_path / "kernel.db", schema.KERNEL, busy_timeout_s=0.2)) as other,
    ):
        with one.transaction():
            began = time.monotonic()
            with pytest.raises(StorageError, match="busy"), other.transaction(wait=False):
                pass
            assert time.monotonic() - began < 0.15
            began = time.monotonic()
            with pytest.raises(StorageError, match="busy"), other.transaction():
                pass  # on the same connection, which waits again
            assert time.monotonic() - began >= 0.15
        with other.transaction(wait=False) as conn:
            conn.execute(insert(schema.settings).values(name="a", value="b"))
