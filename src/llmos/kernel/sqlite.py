"""SQLite beneath a store: one file, durable at every commit, read by its owner only."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final

from sqlalchemy import URL, Connection, Engine, MetaData, create_engine, event
from sqlalchemy.exc import DatabaseError

from llmos.databases import WAIT
from llmos.errors import StorageError, StorageFull
from llmos.kernel import schema

_BEGIN: Final = "llmos_begin"  # execution option: how a connection begins its transaction
# No room for a transaction; no room for the index that SQLite makes when it opens a database.
_NO_ROOM: Final = ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE")
# Primary result codes that speak of the disk or the file, not of a wrong statement.
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


@dataclass(frozen=True, slots=True)
class SQLite:
    """A database in a file; its writers wait for each other by `BEGIN IMMEDIATE`."""

    path: Path
    reading: ClassVar[Mapping[str, Any]] = MappingProxyType({_BEGIN: "DEFERRED"})

    def __str__(self) -> str:
        return str(self.path)

    def engine(self, metadata: MetaData, busy_timeout_s: float) -> Engine:
        """Make an engine whose connections are durable, check foreign keys and wait their turn."""
        engine = create_engine(
            URL.create("sqlite+pysqlite", database=str(self.path)),
            connect_args={"timeout": busy_timeout_s},
            max_overflow=-1,  # a thread waits for SQLite's lock, never for a pooled connection
        )

        @event.listens_for(engine, "connect")
        def configure(dbapi: Any, _record: object) -> None:  # noqa: ANN401 - a sqlite3.Connection
            dbapi.isolation_level = None  # the sqlite3 module would begin transactions by itself
            dbapi.execute("PRAGMA foreign_keys = ON")
            dbapi.execute("PRAGMA synchronous = FULL")
            if metadata is schema.KEYS:
                dbapi.execute("PRAGMA secure_delete = ON")

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            options = connection.get_execution_options()
            kind = options.get(_BEGIN, "IMMEDIATE")
            read_only = "ON" if kind == "DEFERRED" else "OFF"
            wait_ms = round(busy_timeout_s * 1000) if options.get(WAIT, True) else 0
            connection.exec_driver_sql(f"PRAGMA busy_timeout = {wait_ms}")
            connection.exec_driver_sql(f"PRAGMA query_only = {read_only}")
            connection.exec_driver_sql(f"BEGIN {kind}")

        return engine

    @contextmanager
    def migrating(self) -> Iterator[None]:
        """Hold the folder's lock, so that one process at a time makes the file and its schema.

        Raises:
            StorageError: the folder cannot be opened, or the file cannot be made.
        """
        folder = self.path.parent
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise StorageError(
                f"{folder} cannot be opened: {error.strerror}",
                hint="`llmos init` makes a home; `--home` or LLMOS_HOME says where it is",
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            _create_private(self.path)
            yield
        finally:
            os.close(descriptor)

    def prepare(self, engine: Engine) -> None:
        """Write ahead from now on; the file keeps this.

        It is done under the folder's lock, because two processes that set the mode at once do not
        wait for each other: one fails.
        """
        with _cursor(engine) as cursor:
            cursor.execute("PRAGMA journal_mode = WAL")

    def purge(self, engine: Engine, busy_timeout_s: float) -> None:
        """Move the write-ahead log into the file and empty it.

        Raises:
            StorageError: a reader kept its snapshot beyond the busy timeout.
        """
        del busy_timeout_s  # the connections wait by themselves
        with _cursor(engine) as cursor:
            cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            blocked, _, _ = cursor.fetchone() or (True, 0, 0)
        if blocked:
            raise StorageError(
                f"{self.path}: the write-ahead log could not be emptied, someone is reading",
                hint="stop the other LLMOS processes on this home and try again",
            )

    def compact(self, engine: Engine) -> None:
        """Write the file anew from its rows."""
        with _cursor(engine) as cursor:
            for pragma in ("query_only = OFF", "temp_store = MEMORY"):  # no copy elsewhere
                cursor.execute(f"PRAGMA {pragma}")
            cursor.execute("VACUUM")

    def fault(self, error: DatabaseError) -> StorageError | None:
        """Return the typed error of a fault of the disk or the file; none: a wrong statement."""
        name = getattr(error.orig, "sqlite_errorname", "SQLITE_CORRUPT")  # text that is no UTF-8
        if name in _NO_ROOM:
            return StorageFull(
                f"{self.path}: there is no room left on the device; nothing was changed",
                hint="free some space and run the command again",
            )
        if name.startswith("SQLITE_BUSY"):
            return StorageError(
                f"{self.path} was kept busy by another process for longer than the busy timeout",
                hint="wait for the other LLMOS process, or raise LLMOS_BUSY_TIMEOUT_S",
            )
        if name.startswith(_DISK_FAULTS) or "no such" in str(error.orig):  # schema was changed
            return StorageError(
                f"{self.path}: {error.orig}", hint="`llmos doctor` checks the home's files"
            )
        return None


@contextmanager
def _cursor(engine: Engine) -> Iterator[Any]:
    """Yield a cursor outside of transactions, with errors as SQLAlchemy has them."""
    try:
        with closing(engine.raw_connection()) as raw:
            yield raw.cursor()
    except sqlite3.DatabaseError as error:
        raise DatabaseError(None, None, error) from error


def _create_private(path: Path) -> None:
    """Make an empty file that only its owner may read; SQLite gives -wal and -shm the same mode."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return
    except OSError as error:
        raise StorageError(f"{path} cannot be made: {error.strerror}") from error
