"""PostgreSQL beneath a store: one schema each, in a database that several homes may share.

A writer takes the schema's advisory lock before anything else and keeps it to the end of its
transaction. The lock is waited for in the transaction's first statement, so the level must be READ
COMMITTED: every later statement sees all that writers before it committed, and nobody else writes.
With REPEATABLE READ the snapshot would be as old as the beginning of the wait. So a block reads
and writes as if it were alone, which is what `BEGIN IMMEDIATE` gives on SQLite.

Protects against: a host that dies, or its network; what it held is free again within a minute.
Does not protect against: whoever may write to the database by other means (the log and the vault
notice that, as they do with files), and a connection pooler that shares one session among clients.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final

from pydantic import SecretStr
from sqlalchemy import (
    URL,
    Connection,
    Engine,
    MetaData,
    NullPool,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.exc import ArgumentError, DatabaseError, OperationalError

from llmos.crypto import keys
from llmos.databases import WAIT
from llmos.errors import ConfigError, IntegrityError, StorageError, StorageFull

DATABASES: Final = ("kernel", "keys")
_NAME: Final = re.compile(rb"llmos_[0-9a-f]{16}\n?")
_DRIVERS: Final = frozenset({"postgresql", "postgresql+psycopg"})
_SETTINGS: Final[Mapping[str, object]] = {
    "synchronous_commit": "on",
    "client_encoding": "UTF8",
    # A host that lost its power or network says nothing; the server asks, and frees its locks.
    "tcp_keepalives_idle": 30,
    "tcp_keepalives_interval": 10,
    "tcp_keepalives_count": 3,
}
# SQLSTATE classes and codes that speak of the server or the connection, not of a wrong statement.
_FAULTS: Final = (
    "08",
    "25006",
    "28",
    "3D",
    "3F",
    "40",
    "42501",
    "42P06",
    "53",
    "57",
    "58",
    "F0",
    "XX",
)
# Transactions of this database that have a number or a snapshot, or hide it (those of other roles:
# their state is not shown, like that of autovacuum, whose ANALYZE has a snapshot like any other).
_HOLDING: Final = (
    "SELECT l.virtualxid FROM pg_locks l JOIN pg_stat_activity a USING (pid) "
    "WHERE l.locktype = 'virtualxid' AND a.datname = current_database() "
    "AND a.pid <> pg_backend_pid() "
    "AND (a.state IS NULL OR a.backend_xid IS NOT NULL OR a.backend_xmin IS NOT NULL)"
)
_LOCKED: Final = (
    "SELECT count(*) FROM pg_locks JOIN pg_database d ON d.oid = database "
    "WHERE locktype = 'advisory' AND d.datname = current_database() "
    "AND (classid, objid, objsubid) = (%s, %s, 1) AND granted"
)
_TABLES: Final = "SELECT quote_ident(tablename) FROM pg_tables WHERE schemaname = current_schema()"
_PAUSE_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class PostgreSQL:
    """A schema of a PostgreSQL database."""

    url: URL = field(repr=False)
    schema: str
    reading: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
    )

    def __str__(self) -> str:
        return f"PostgreSQL schema {self.schema}"

    def engine(self, metadata: MetaData, busy_timeout_s: float) -> Engine:
        """Make an engine whose writers take turns; each connection sees this schema only."""
        del metadata
        engine = create_engine(
            self.url,
            connect_args=self._options(lock_timeout=_milliseconds(busy_timeout_s)),
            isolation_level="READ COMMITTED",
            max_overflow=-1,  # a thread waits for the advisory lock, never for a connection
            pool_pre_ping=True,  # the server may have been started anew
        )

        @event.listens_for(engine, "begin")
        def take_turn(connection: Connection) -> None:
            options = connection.get_execution_options()
            if "isolation_level" not in options:
                if not options.get(WAIT, True):
                    connection.exec_driver_sql("SET LOCAL lock_timeout = '1ms'")
                # without a parameter: the server would keep this statement's snapshot for it
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({self._key()})")

        return engine

    def migrating(self) -> AbstractContextManager[None]:
        """Hold nothing: the migration's transaction has the writers' lock."""
        return nullcontext()

    def prepare(self, engine: Engine) -> None:
        """Do nothing: a schema is made with its home and never by chance."""

    def purge(self, engine: Engine, busy_timeout_s: float) -> None:
        """Write the tables anew without what was deleted, once nobody can see that any more.

        `VACUUM FULL` keeps every row that some snapshot in the database might still show. Those
        that began before now are waited for, and then those that began meanwhile: their snapshots
        may be as old as a writer that was waited for.

        What was written to the write-ahead log, archives, replicas and backups stays there.

        Raises:
            StorageError: a transaction in this database did not end within the busy timeout.
        """
        del engine
        deadline = time.monotonic() + busy_timeout_s
        with self._session() as connection:
            for _ in range(2):
                before = _holding(connection)
                while before & _holding(connection):
                    if time.monotonic() > deadline:
                        raise StorageError(
                            f"{self}: deleted rows could not be removed, someone is reading",
                            hint="end the other transactions in this database and try again",
                        )
                    time.sleep(_PAUSE_S)
            tables = ", ".join(connection.exec_driver_sql(_TABLES).scalars())
            connection.exec_driver_sql(f"SET lock_timeout = {_milliseconds(busy_timeout_s)}")
            connection.exec_driver_sql(f"VACUUM FULL {tables}")

    def compact(self, engine: Engine) -> None:
        """Do nothing: `purge` writes the tables anew."""

    def run(self, statement: str, *values: object) -> Any:  # noqa: ANN401 - of any column
        """Run one statement outside of a transaction; return its first value, if it has rows.

        Raises:
            StorageError: the server cannot be reached, or lets this role not do it.
        """
        with self._translated(), self._session() as connection:
            rows = connection.exec_driver_sql(statement, values)
            return rows.scalar() if rows.returns_rows else None

    @contextmanager
    def locked(self, name: str) -> Iterator[bool]:
        """Lock a name for the time of the block, unless another session has; yield whether it is.

        The lock ends with the block, or with its connection: when this process dies or its host is
        not heard of any more. The block's end does not rely on the latter: a server takes note of a
        connection that was closed when it comes to it, and the next one would be told to wait.

        Raises:
            StorageError: the server cannot be reached.
        """
        with ExitStack() as opened:
            with self._translated():
                connection = opened.enter_context(self._session())
                asked = "SELECT pg_try_advisory_lock(%s)"
                found = connection.exec_driver_sql(asked, (self._key(name),)).scalar_one()
            try:
                yield bool(found)
            finally:
                if found:
                    with suppress(DatabaseError):  # the connection is dead, and the lock with it
                        connection.exec_driver_sql("SELECT pg_advisory_unlock_all()")

    def is_locked(self, name: str) -> bool:
        """Tell whether someone has locked a name; unlike a try to lock it, nobody notices this.

        Raises:
            StorageError: the server cannot be reached.
        """
        high, low = divmod(self._key(name) % 2**64, 2**32)
        return bool(self.run(_LOCKED, high, low))

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """Yield a connection that can only read, on one snapshot; nothing is made or upgraded.

        Raises:
            StorageError: the server cannot be reached.
        """
        engine = create_engine(self.url, connect_args=self._options(), poolclass=NullPool)
        with ExitStack() as opened:
            with self._translated():
                reading = engine.execution_options(**self.reading)
                connection = opened.enter_context(reading.begin())
            yield connection

    def _options(self, **settings: object) -> dict[str, str]:
        """Return how to connect: each connection sees this schema only."""
        wanted = {**_SETTINGS} | {"search_path": self.schema} | settings
        return {"options": " ".join(f"-c{name}={value}" for name, value in wanted.items())}

    @contextmanager
    def _session(self) -> Iterator[Connection]:
        """Yield a connection of its own that is outside of any transaction."""
        engine = create_engine(
            self.url,
            connect_args=self._options(),
            isolation_level="AUTOCOMMIT",
            poolclass=NullPool,
        )
        connection = engine.connect()
        try:
            yield connection
        finally:
            connection.invalidate()  # closes it; nothing is said on it that could fail
            connection.close()

    def _key(self, name: str = "") -> int:
        """Return the advisory lock of a name in this schema: 64 bits of its SHA-256, signed."""
        digest = hashlib.sha256(f"{self.schema}/{name}".encode()).digest()
        return int.from_bytes(digest[:8], signed=True)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except DatabaseError as error:
            if (fault := self.fault(error)) is not None:
                raise fault from error
            raise

    def fault(self, error: DatabaseError) -> StorageError | None:
        """Return the typed error of a fault of the server; none: a wrong statement."""
        state = getattr(error.orig, "sqlstate", None) or ""
        if not state and isinstance(error, OperationalError):
            state = "08"  # there is no connection that could have told one
        if state == "53100":
            return StorageFull(
                f"{self}: there is no room left on the server's device; nothing was changed",
                hint="free some space there and run the command again",
            )
        if state == "55P03":
            return StorageError(
                f"{self} was kept busy by another process for longer than the busy timeout",
                hint="wait for the other LLMOS process, or raise LLMOS_BUSY_TIMEOUT_S",
            )
        if state.startswith(_FAULTS):
            return StorageError(
                f"{self}: {' '.join(str(error.orig).split())}",
                hint="does LLMOS_DATABASE_URL name this home's database, and does its server run?",
            )
        return None


def find(secret: SecretStr | None, file: Path, name: str) -> PostgreSQL:
    """Return a home's database of this name.

    Args:
        secret: LLMOS_DATABASE_URL; see `parse`.
        file: what `create` wrote into the home.
        name: one of `DATABASES`.

    Raises:
        ConfigError: the home and LLMOS_DATABASE_URL do not go together; see also `parse`.
        IntegrityError: the file is not what was written.
    """
    if secret is None or not file.exists():
        where, then = ("on PostgreSQL", "set") if secret is None else ("its own files", "unset")
        raise ConfigError(
            f"the databases of {file.parent} are {where}", hint=f"{then} LLMOS_DATABASE_URL"
        )
    if not _NAME.fullmatch(prefix := file.read_bytes()):
        raise IntegrityError(f"{file} is damaged", hint="restore it from a backup")
    return PostgreSQL(parse(secret), f"{prefix.decode().strip()}_{name}")


def create(secret: SecretStr, file: Path, undo: ExitStack) -> None:
    """Make the schemas of a new home and write to `file` how they are called; `undo` drops them.

    Raises:
        ConfigError: see `parse`.
        StorageError: the server cannot be reached, or lets this role make no schema.
    """
    prefix = f"llmos_{secrets.token_hex(8)}"
    for name in DATABASES:
        schema = PostgreSQL(parse(secret), f"{prefix}_{name}")
        schema.run(f"CREATE SCHEMA {schema.schema}")
        undo.callback(schema.run, f"DROP SCHEMA {schema.schema} CASCADE")
    keys.write_private(file, f"{prefix}\n".encode())


def _milliseconds(seconds: float) -> int:
    return max(1, round(1000 * seconds))  # 0 would wait for ever


def _holding(connection: Connection) -> set[str]:
    return set(connection.exec_driver_sql(_HOLDING).scalars())


def parse(secret: SecretStr) -> URL:
    """Return the URL for psycopg; no message quotes it, since it may hold a password.

    Over the network the server must prove its name by TLS, unless the URL has another `sslmode`;
    a Unix socket has no TLS.

    Raises:
        ConfigError: it is no URL of PostgreSQL, or psycopg is not installed.
    """
    try:
        url = make_url(secret.get_secret_value())
    except (ArgumentError, ValueError):
        url = None
    # An "@" that is left means a password that was not encoded: a part of it became the host.
    if url is None or url.drivername not in _DRIVERS or "@" in f"{url.host}{url.database}":
        raise ConfigError(
            "LLMOS_DATABASE_URL is no URL like postgresql://user:password@host/database",
            hint="write signs like @ and / in the password as %40 and %2F",
        )
    if find_spec("psycopg") is None:
        raise ConfigError("psycopg is not installed", hint="pip install 'llmos[postgres]'")
    modes = {"sslmode": "verify-full"}
    return url.set(drivername="postgresql+psycopg", query=modes | dict(url.query))
