"""The kernel's databases: one SQLite file each, opened, migrated and written only through here."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from sqlalchemy import URL, Connection, Engine, MetaData, create_engine, event, inspect
from sqlalchemy.exc import DatabaseError

from llmos.errors import StorageError, StorageFull
from llmos.kernel import schema

_BEGIN: Final = "llmos_begin"  # execution option: how a connection begins its transaction
_WAIT: Final = "llmos_wait"  # execution option: whether it waits for another one's transaction
_MIGRATIONS: Final = Path(__file__).parent / "migrations"
_BRANCHES: Final = {schema.KERNEL: "kernel", schema.KEYS: "keys"}

# SQLite's primary result codes that speak of the disk or the file, not of a wrong statement.
_DISK_FAULTS: Final = (
    "SQLITE_CANTOPEN",
    "SQLITE_CORRUPT",
    "SQLITE_IOERR",
    "SQLITE_LOCKED",
    "SQLITE_NOTADB",
    "SQLITE_PERM",
    "SQLITE_PROTOCOL",
    "SQLITE_READONLY",
)


def timestamp(moment: datetime) -> str:
    """Write an aware time as RFC 3339 text in UTC; such texts sort in the order of time."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def now() -> str:
    """Return the present time as RFC 3339 text in UTC, to the millisecond."""
    return timestamp(datetime.now(UTC))


@dataclass(frozen=True, slots=True)
class Store:
    """One database file; any number of threads and processes may use it at once.

    Writers take turns: a transaction that finds another one open waits for it up to the busy
    timeout. Do not carry an open store into a forked child; open it there.
    """

    path: Path
    metadata: MetaData
    _engine: Engine = field(repr=False)
    _writing: threading.local = field(default_factory=threading.local, repr=False)

    @classmethod
    def open(cls, path: Path, metadata: MetaData, *, busy_timeout_s: float = 60.0) -> Store:
        """Open a database of `schema.KERNEL` or `schema.KEYS`; create or upgrade it when needed.

        Raises:
            StorageError: the folder or file cannot be used, or was written by a newer LLMOS.
        """
        engine = _make_engine(path, busy_timeout_s, overwrite_deleted=metadata is schema.KEYS)
        store = cls(path, metadata, engine)
        try:
            store.migrate()
        except StorageError:
            store.close()
            raise
        return store

    def migrate(self) -> None:
        """Bring the schema to the code's revision; a no-op when it is there already.

        Raises:
            StorageError: the folder or file cannot be used, or was written by a newer LLMOS.
        """
        with _exclusive(self.path.parent), _translated(self.path):
            _create_private(self.path)
            if self._is_current():
                return
            # The mode is kept in the file. It is set under the folder's lock, because two
            # processes that set it at once do not wait for each other: one fails.
            with closing(self._engine.raw_connection()) as raw:
                raw.cursor().execute("PRAGMA journal_mode = WAL")
            with self.transaction() as connection:
                _upgrade(connection, _BRANCHES[self.metadata])

    def _is_current(self) -> bool:
        """Tell whether the schema is at the newest revision, without loading Alembic (slow)."""
        with self.read() as connection:
            if not inspect(connection).has_table("alembic_version"):
                return False
            revision = connection.exec_driver_sql("SELECT version_num FROM alembic_version")
            found = str(revision.scalar_one())
        versions = _MIGRATIONS / "versions"
        known = {file.stem for file in versions.glob(f"{_BRANCHES[self.metadata]}_*.py")}
        if found not in known:
            raise StorageError(
                f"{self.path} was written by a newer LLMOS: it has schema {found}, "
                f"this version knows {max(known)}",
                hint="use that version again, or restore the backup made before the upgrade",
            )
        return found == max(known)

    @contextmanager
    def transaction(self, *, wait: bool = True) -> Iterator[Connection]:
        """Yield a connection inside `BEGIN IMMEDIATE`: all of the block is durable, or none of it.

        Raises:
            StorageFull: there is no room on the device; the transaction left no trace.
            StorageError: the file cannot be written, another process held it beyond the busy
                timeout (or at all, without `wait`), or this thread is inside a transaction of this
                store already.
        """
        if getattr(self._writing, "active", False):
            # Waiting for oneself would end only at the busy timeout.
            raise StorageError(f"{self.path}: a transaction was begun inside another one")
        self._writing.active = True
        try:
            engine = self._engine.execution_options(**{_WAIT: wait})
            with _translated(self.path), engine.begin() as connection:
                yield connection
        finally:
            self._writing.active = False

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Yield a connection on one consistent snapshot; writing through it is refused.

        Raises:
            StorageError: the file cannot be read, or a write was tried.
        """
        reading = self._engine.execution_options(**{_BEGIN: "DEFERRED"})
        with _translated(self.path), reading.begin() as connection:
            yield connection

    def checkpoint(self) -> None:
        """Move the write-ahead log into the file and empty it, so that deleted rows leave the disk.

        Raises:
            StorageError: a reader kept its snapshot beyond the busy timeout.
        """
        with _translated(self.path), closing(self._engine.raw_connection()) as raw:
            cursor = raw.cursor()
            cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            blocked, _, _ = cursor.fetchone() or (True, 0, 0)
        if blocked:
            raise StorageError(
                f"{self.path}: the write-ahead log could not be emptied, someone is reading",
                hint="stop the other LLMOS processes on this home and try again",
            )

    def close(self) -> None:
        """Close the pooled connections; the store may be used again and opens new ones."""
        self._engine.dispose()


def _make_engine(path: Path, busy_timeout_s: float, *, overwrite_deleted: bool) -> Engine:
    """Make an engine whose connections are durable, check foreign keys and wait their turn."""
    engine = create_engine(
        URL.create("sqlite+pysqlite", database=str(path)),
        connect_args={"timeout": busy_timeout_s},
        max_overflow=-1,  # a thread waits for SQLite's lock, never for a pooled connection
    )

    @event.listens_for(engine, "connect")
    def configure(dbapi: Any, _record: object) -> None:  # noqa: ANN401 - a sqlite3.Connection
        dbapi.isolation_level = None  # the sqlite3 module would begin transactions by itself
        dbapi.execute("PRAGMA foreign_keys = ON")
        dbapi.execute("PRAGMA synchronous = FULL")
        if overwrite_deleted:
            dbapi.execute("PRAGMA secure_delete = ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        options = connection.get_execution_options()
        kind = options.get(_BEGIN, "IMMEDIATE")
        read_only = "ON" if kind == "DEFERRED" else "OFF"
        wait_ms = round(busy_timeout_s * 1000) if options.get(_WAIT, True) else 0
        connection.exec_driver_sql(f"PRAGMA busy_timeout = {wait_ms}")
        connection.exec_driver_sql(f"PRAGMA query_only = {read_only}")
        connection.exec_driver_sql(f"BEGIN {kind}")

    return engine


def _create_private(path: Path) -> None:
    """Make an empty file that only its owner may read; SQLite gives -wal and -shm the same mode."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return
    except OSError as error:
        raise StorageError(f"{path} cannot be made: {error.strerror}") from error


def _upgrade(connection: Connection, branch: str) -> None:
    """Run the Alembic migrations up to the newest revision inside the caller's transaction."""
    from alembic import command  # noqa: PLC0415 - slow to load, needed once in a home's life
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, f"{branch}@head")


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that one process at a time looks at and changes the schema."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be opened: {error.strerror}",
            hint="`llmos init` makes a home; `--home` or LLMOS_HOME says where it is",
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn faults of the disk and the file into typed errors; let wrong statements through."""
    try:
        yield
    except DatabaseError as error:
        name = getattr(error.orig, "sqlite_errorname", "")
        if name == "SQLITE_FULL":
            raise StorageFull(
                f"{path}: there is no room left on the device; nothing was changed",
                hint="free some space and run the command again",
            ) from error
        if name.startswith("SQLITE_BUSY"):
            raise StorageError(
                f"{path} was kept busy by another process for longer than the busy timeout",
                hint="wait for the other LLMOS process, or raise LLMOS_BUSY_TIMEOUT_S",
            ) from error
        if name.startswith(_DISK_FAULTS):
            raise StorageError(
                f"{path}: {error.orig}", hint="`llmos doctor` checks the home's files"
            ) from error
        raise
