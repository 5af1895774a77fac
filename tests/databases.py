"""The database that a test is run on: SQLite files, or schemas of a real PostgreSQL server.

`LLMOS_DATABASE_URL` is what tells them apart, for the code under test as for the tests: while it is
set, homes are made on PostgreSQL, and `place` gives a schema for what would be a file.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from pydantic import SecretStr
from sqlalchemy import URL, Connection, MetaData, NullPool, create_engine, text
from tests.postgresql import PROGRAMS

from llmos.databases.postgresql import DATABASES, PostgreSQL, parse
from llmos.kernel.store import Store

# Warnings are errors, but that a process ends with an open connection: the server is used to it.
STRICT: Final = ("-W", "error", "-W", "ignore:<psycopg.Connection object:ResourceWarning")
SETTING: Final = "LLMOS_DATABASE_URL"
_PSQL_ONLY: Final = re.compile(r"^\\.*$", re.MULTILINE)  # lines of a dump that are no SQL


def server_url() -> SecretStr | None:
    """Return the URL of the server under test, if the test is run on PostgreSQL."""
    given = os.environ.get(SETTING)  # noqa: TID251 - what the code under test reads
    return None if given is None else SecretStr(given)


def place(path: Path) -> Path | PostgreSQL:
    """Return where the database that a test calls `path` is: that file, or a schema of its own."""
    url = server_url()
    if url is None:
        return path
    name = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    schema = PostgreSQL(parse(url), f"llmos_{name}_{path.stem}")
    with administrator() as conn:
        conn.execute(text("SELECT pg_advisory_xact_lock(1)"))  # IF NOT EXISTS is no protection
        conn.execute(text(f"CREATE SCHEMA IF NOT EXISTS {schema.schema} AUTHORIZATION llmos"))
    return schema


def open_store(path: Path, metadata: MetaData, **options: Any) -> Store:
    """Open the database that a test calls `path`."""
    return Store.open(place(path), metadata, **options)


def copy_home(source: Path, target: Path) -> Path:
    """Copy a home with its databases, as two homes that know nothing of each other."""
    shutil.copytree(source, target)
    if (target / "schema").exists():
        old = (target / "schema").read_text().strip()
        new = f"llmos_{secrets.token_hex(8)}"
        with administrator() as conn:
            conn.exec_driver_sql(_dump(old).replace(old, new).replace("%", "%%"))
        (target / "schema").write_text(f"{new}\n")
    return target


@contextmanager
def outside(home: Path, database: str = "kernel") -> Iterator[Connection]:
    """Change a home's database as someone who is not LLMOS, in one transaction."""
    if not (home / "schema").exists():
        engine = create_engine(URL.create("sqlite", database=str(home / f"{database}.db")))
        with engine.begin() as conn:
            yield conn
        engine.dispose()
        return
    with administrator() as conn:
        schema = f"{(home / 'schema').read_text().strip()}_{database}"
        conn.exec_driver_sql(f"SET LOCAL search_path = {schema}")
        yield conn


def refuse(conn: Connection, change: str, table: str, *, when: str | None = None) -> None:
    """Let the database refuse a change of a table, like "UPDATE OF column", from now on."""
    condition = "" if when is None else f"WHEN ({when})"
    if conn.dialect.name == "sqlite":
        act = "BEGIN SELECT RAISE(ABORT, 'no more'); END"
    else:
        conn.exec_driver_sql(
            "CREATE OR REPLACE FUNCTION no_more() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "RAISE integrity_constraint_violation USING MESSAGE = 'no more'; END $$"
        )
        act = "EXECUTE FUNCTION no_more()"
    conn.exec_driver_sql(
        f"CREATE TRIGGER refuse BEFORE {change} ON {table} FOR EACH ROW {condition} {act}"
    )


def allow(conn: Connection, table: str, trigger: str = "refuse") -> None:
    """Remove a trigger of a table."""
    of_table = "" if conn.dialect.name == "sqlite" else f" ON {table}"
    conn.exec_driver_sql(f"DROP TRIGGER {trigger}{of_table}")


def on_disk(path: Path) -> bytes:
    """Return all that the files of the tables of a test's database hold, without WAL segments."""
    if server_url() is None:
        return b"".join(file.read_bytes() for file in path.parent.glob(f"{path.name}*"))
    with administrator() as conn:
        folder = Path(conn.execute(text("SHOW data_directory")).scalar_one())
        number = conn.execute(
            text("SELECT oid FROM pg_database WHERE datname = current_database()")
        ).scalar_one()
    with administrator() as conn:
        conn.execute(text("CHECKPOINT"))  # pages reach the files; files of dropped tables go
    files = (folder / f"base/{number}").iterdir()
    # The server removes the file of its catalogue's cache whenever it likes.
    return b"".join(file.read_bytes() for file in files if file.name != "pg_internal.init")


def schemas() -> list[str]:
    """Return the names of all schemas of homes on the server under test."""
    with administrator() as conn:
        names = "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'llmos%' ORDER BY 1"
        return list(conn.execute(text(names)).scalars())


@contextmanager
def administrator() -> Iterator[Connection]:
    """Yield a connection of the server's superuser to the homes' database, in a transaction."""
    url = server_url()
    assert url is not None
    engine = create_engine(parse(url).set(username="postgres"), poolclass=NullPool)
    with engine.begin() as conn:
        yield conn


def _dump(prefix: str) -> str:
    """Return the SQL that makes a home's schemas anew with all that is in them."""
    url = server_url()
    assert url is not None
    wanted = [f"--schema={prefix}_{name}" for name in DATABASES]
    command = [str(PROGRAMS / "pg_dump"), "--inserts", *wanted, url.get_secret_value()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return _PSQL_ONLY.sub("", done.stdout)
