"""The lease on a job: one live process holds it, and it is free again when that process dies."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from llmos.errors import JobBusy, StorageError

_TRIES: Final = 10
_PAUSE_S: Final = 0.02


@contextmanager
def hold(folder: Path, job_id: str) -> Iterator[None]:
    """Hold a job's lease for the time of the block, by a lock on a file in `folder`.

    Raises:
        JobBusy: another block, here or in another process, holds it.
        StorageError: the lock file cannot be made.
    """
    with _locked(folder, job_id, fcntl.LOCK_EX) as locked:
        if not locked:
            raise JobBusy(
                f"job {job_id} is being run by another process",
                hint=f"follow it with `llmos jobs show {job_id}`",
            )
        yield


def is_held(folder: Path, job_id: str) -> bool:
    """Tell whether someone holds a job's lease right now.

    Raises:
        StorageError: the lock file cannot be made.
    """
    with _locked(folder, job_id, fcntl.LOCK_SH) as locked:
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
