"""Files that workflows write for people: each appears whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from llmos.errors import StorageError


def write(path: Path, data: bytes) -> None:
    """Write a file, in place of one that is there.

    Raises:
        StorageError: it cannot be written; what was there before is unchanged.
    """
    draft = path.with_name(f".{path.name}.tmp")
    with _refusals(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            draft.write_bytes(data)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file that an earlier run wrote, if it is there.

    Raises:
        StorageError: it cannot be removed.
    """
    with _refusals(path):
        path.unlink(missing_ok=True)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write a new folder that only its owner can enter, and return its files.

    Raises:
        StorageError: something is there already, or it cannot be written; nothing was changed.
    """
    with new_folder(folder) as draft:
        for name, data in files.items():
            (draft / name).write_bytes(data)
    return [folder.absolute() / name for name in sorted(files)]


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a draft that becomes `folder` when the block ends, and vanishes when it fails.

    Raises:
        StorageError: something is there already, or it cannot be written; nothing was changed.
    """
    folder = folder.absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise StorageError(f"{folder} is there already", hint="name a new folder")
    with _refusals(folder):
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        try:
            yield draft
            draft.replace(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError.of(error, str(path)) from error
