"""A lease: one live process holds it, and it is free again when that process dies.

It is on what two processes must not do at once: a job, a site's part in a federation, the work of a
coordinator.

For a home on SQLite it is a lock on a file in the home's folder `run`, for all processes of one
machine. For a home on PostgreSQL it is a lock of a session in the database, for processes of all
machines that use it.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Final

from llmos.databases.postgresql import PostgreSQL
from llmos.errors import JobBusy, StorageError
from llmos.kernel.store import Store

_TRIES: Final = 10
_PAUSE_S: Final = 0.02


def place(store: Store, home: Path) -> Path | PostgreSQL:
    """Return where a home's leases are: its database's server, or `home/run` where it has none."""
    database = store.database
    return database if isinstance(database, PostgreSQL) else home / "run"


@contextmanager
def hold(place: Path | PostgreSQL, name: str, busy: JobBusy | None = None) -> Iterator[None]:
    """Hold a lease for the time of the block, in a folder or in a database.

    Args:
        place: where leases are.
        name: of what is leased; a job's id.
        busy: what is raised where another has it; None for a job.

    Raises:
        JobBusy: another block, here or in another process, holds it.
        StorageError: the lock file cannot be made, or the database cannot be reached.
    """
    if isinstance(place, Path):
        lock: AbstractContextManager[bool] = _locked(place, name, fcntl.LOCK_EX)
    else:
        lock = place.locked(name)
    with lock as locked:
        if not locked:
            raise busy or JobBusy(
                f"job {name} is being run by another process",
                hint=f"follow it with `llmos jobs show {name}`",
            )
        yield


def is_held(place: Path | PostgreSQL, name: str) -> bool:
    """Tell whether someone holds a lease right now.

    Raises:
        StorageError: the lock file cannot be made, or the database cannot be reached.
    """
    if not isinstance(place, Path):
        return place.is_locked(name)
    with _locked(place, name, fcntl.LOCK_SH) as locked:
        return not locked


@contextmanager
def _locked(folder: Path, name: str, kind: int) -> Iterator[bool]:
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(folder / f"{name}.lock", os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise StorageError.of(error, f"the lease of {name}") from error
    try:
        yield _lock(descriptor, kind)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int) -> bool:
    """Lock a file unless someone else does; `is_held` does so for microseconds, which is waited."""
    for _ in range(_TRIES):
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        time.sleep(_PAUSE_S)
    return False
