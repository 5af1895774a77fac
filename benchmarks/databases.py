"""Where a benchmark keeps its database: a file, or schemas of a PostgreSQL server while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pydantic import SecretStr

from llmos.databases import postgresql
from llmos.databases.postgresql import PostgreSQL


@contextmanager
def database(folder: Path, url: str | None) -> Iterator[Path | PostgreSQL]:
    """Yield a file in `folder`, or a new schema of the database at `url`, dropped afterwards."""
    with ExitStack() as undo:
        if url is not None:
            postgresql.create(SecretStr(url), folder / "schema", undo)
        yield located(folder, url)


def located(folder: Path, url: str | None) -> Path | PostgreSQL:
    """Return the place of a database that `database` made, also for another process."""
    if url is None:
        return folder / "kernel.db"
    return postgresql.find(SecretStr(url), folder / "schema", "kernel")
