"""The lease on a job: one live process holds it, and it is free again when that process dies.

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

_TRIES: Final = 10
_PAUSE_S: Final = 0.02


@contextmanager
def hold(place: Path | PostgreSQL, job_id: str) -> Iterator[None]:
    """Hold a job's lease for the time of the block, in a folder or in a database.

    Raises:
        JobBusy: another block, here or in another process, holds it.
        StorageError: the lock file cannot be made, or the database cannot be reached.
    """
    if isinstance(place, Path):
        lock: AbstractContextManager[bool] = _locked(place, job_id, fcntl.LOCK_EX)
    else:
        lock = place.locked(job_id)
    with lock as locked:
        if not locked:
            raise JobBusy(
                f"job {job_id} is being run by another process",
                hint=f"follow it with `llmos jobs show {job_id}`",
            )
        yield


def is_held(place: Path | PostgreSQL, job_id: str) -> bool:
    """Tell whether someone holds a job's lease right now.

    Raises:
        StorageError: the lock file cannot be made, or the database cannot be reached.
    """
    if not isinstance(place, Path):
        return place.is_locked(job_id)
    with _locked(place, job_id, fcntl.LOCK_SH) as locked:
        return not locked


@contextmanager
def _locked(folder: Path, job_id: str, kind: int) -> Iterator[bool]:
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(folder / f"{job_id}.lock", os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise StorageError.of(error, f"the lease of job {job_id}") from error
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
