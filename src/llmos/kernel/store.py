"""The kernel's databases: opened, migrated and written only through here."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol

from sqlalchemy import Connection, Engine, MetaData, inspect
from sqlalchemy.exc import DatabaseError

from llmos.databases import WAIT
from llmos.errors import StorageError
from llmos.kernel import schema
from llmos.kernel.sqlite import SQLite

_MIGRATIONS: Final = Path(__file__).parent / "migrations"
_BRANCHES: Final = {schema.KERNEL: "kernel", schema.KEYS: "keys"}


def timestamp(moment: datetime) -> str:
    """Write an aware time as RFC 3339 text in UTC; such texts sort in the order of time."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def now() -> str:
    """Return the present time as RFC 3339 text in UTC, to the millisecond."""
    return timestamp(datetime.now(UTC))


class Database(Protocol):
    """Where the tables of a store are; its text names the place, without any secret."""

    @property
    def reading(self) -> Mapping[str, Any]:
        """Execution options that begin a read-only transaction on one snapshot."""

    def engine(self, metadata: MetaData, busy_timeout_s: float) -> Engine:
        """Make an engine whose transactions are durable and, if they may write, take turns."""

    def migrating(self) -> AbstractContextManager[None]:
        """Hold what lets one process at a time make the place of the tables."""

    def prepare(self, engine: Engine) -> None:
        """Do what must be done once, before the first table is made."""

    def purge(self, engine: Engine, busy_timeout_s: float) -> None:
        """Let deleted rows leave the files of the tables."""

    def compact(self, engine: Engine) -> None:
        """Write the files anew from the rows, where `purge` does not do so."""

    def fault(self, error: DatabaseError) -> StorageError | None:
        """Return the typed error of a fault of the place; none: a wrong statement."""


@dataclass(frozen=True, slots=True)
class Store:
    """One database; any number of threads and processes may use it at once.

    Writers take turns: a transaction that finds another one open waits for it up to the busy
    timeout. Do not carry an open store into a forked child; open it there.
    """

    database: Database
    metadata: MetaData
    busy_timeout_s: float
    _engine: Engine = field(repr=False)
    _writing: threading.local = field(default_factory=threading.local, repr=False)

    @classmethod
    def open(
        cls, place: Path | Database, metadata: MetaData, *, busy_timeout_s: float = 60.0
    ) -> Store:
        """Open a database of `schema.KERNEL` or `schema.KEYS`; create or upgrade it when needed.

        Args:
            place: a file for SQLite, or another database.
            metadata: its tables.
            busy_timeout_s: how long a writer waits for another one.

        Raises:
            StorageError: the place cannot be used, or was written by a newer LLMOS.
        """
        database = SQLite(place) if isinstance(place, Path) else place
        engine = database.engine(metadata, busy_timeout_s)
        store = cls(database, metadata, busy_timeout_s, engine)
        try:
            store.migrate()
        except StorageError:
            store.close()
            raise
        return store

    def migrate(self) -> None:
        """Bring the schema to the code's revision; a no-op when it is there already.

        Raises:
            StorageError: the place cannot be used, or was written by a newer LLMOS.
        """
        with self.database.migrating(), self._translated():
            if self._is_current():
                return
            self.database.prepare(self._engine)
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
                f"{self.database} was written by a newer LLMOS: it has schema {found}, "
                f"this version knows {max(known)}",
                hint="use that version again, or restore the backup made before the upgrade",
            )
        return found == max(known)

    @contextmanager
    def transaction(self, *, wait: bool = True) -> Iterator[Connection]:
        """Yield a connection as the only writer: all of the block is durable, or none of it.

        Raises:
            StorageFull: there is no room on the device; the transaction left no trace.
            StorageError: the database cannot be written, another process held it beyond the busy
                timeout (or at all, without `wait`), or this thread is inside a transaction of this
                store already.
        """
        if getattr(self._writing, "active", False):
            # Waiting for oneself would end only at the busy timeout.
            raise StorageError(f"{self.database}: a transaction was begun inside another one")
        self._writing.active = True
        try:
            engine = self._engine.execution_options(**{WAIT: wait})
            with self._translated(), engine.begin() as connection:
                yield connection
        finally:
            self._writing.active = False

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Yield a connection on one consistent snapshot; writing through it is refused.

        Raises:
            StorageError: the database cannot be read, or a write was tried.
        """
        reading = self._engine.execution_options(**self.database.reading)
        with self._translated(ValueError), reading.begin() as connection:
            yield connection

    def checkpoint(self) -> None:
        """Let deleted rows leave the disk, as far as the database can: see `purge` of its class.

        Raises:
            StorageError: a reader kept its snapshot beyond the busy timeout.
        """
        with self._translated():
            self.database.purge(self._engine, self.busy_timeout_s)

    def compact(self) -> None:
        """Write the files anew from their rows: copies that were left of deleted ones are gone.

        Raises:
            StorageFull: there is no room for the second copy; nothing was changed.
            StorageError: a reader kept its snapshot beyond the busy timeout.
        """
        with self._translated():
            self.database.compact(self._engine)
        self.checkpoint()

    def close(self) -> None:
        """Close the pooled connections; the store may be used again and opens new ones."""
        self._engine.dispose()

    @contextmanager
    def _translated(self, unreadable: type[ValueError] = UnicodeDecodeError) -> Iterator[None]:
        """Turn faults of the place into typed errors; let wrong statements through.

        Where rows are only read, whatever cannot be made of them is `unreadable`.
        """
        try:
            yield
        except DatabaseError as error:
            if (fault := self.database.fault(error)) is not None:
                raise fault from error
            raise
        except unreadable as error:
            raise StorageError(f"{self.database}: {error}", hint="see `llmos doctor`") from error


def _upgrade(connection: Connection, branch: str) -> None:
    """Run the Alembic migrations up to the newest revision inside the caller's transaction."""
    from alembic import command  # noqa: PLC0415 - slow to load, needed once in a home's life
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, f"{branch}@head")
