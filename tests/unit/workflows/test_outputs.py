from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from llmos.errors import StorageError, StorageFull
from llmos.workflows import outputs


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "file"
    outputs.write(path, b"one")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StorageFull):
        outputs.write(path, b"two")
    with pytest.raises(StorageFull):
        outputs.write_folder(tmp_path / "folder", {"a": b"1"})
    assert path.read_bytes() == b"one"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "new"]


def test_a_new_folder_is_for_its_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert outputs.write_folder(folder, {"y": b"1", "x": b"2"}) == [folder / "x", folder / "y"]
    assert folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "empty").mkdir()
    outputs.write_folder(tmp_path / "empty", {"x": b"2"})
    assert (tmp_path / "empty" / "x").read_bytes() == b"2"


def test_what_is_there_is_never_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_bytes(b"mine")
    for taken in ("file", "full"):
        with pytest.raises(StorageError, match="is there already"):
            outputs.write_folder(tmp_path / taken, {"x": b""})
    with pytest.raises(StorageError):
        outputs.write_folder(tmp_path / "file" / "inside", {"x": b""})
    assert (tmp_path / "file").read_bytes() == (tmp_path / "full/file").read_bytes() == b"mine"


def test_a_file_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot be used"):
        outputs.write(tmp_path / "file" / "inside", b"")


def test_what_an_earlier_run_wrote_is_removed_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    outputs.remove(tmp_path / "file")
    outputs.remove(tmp_path / "file")
    assert not list(tmp_path.iterdir())
    with pytest.raises(StorageError):
        outputs.remove(tmp_path)
