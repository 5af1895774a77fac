from __future__ import annotations

import socket
import sys
import venv
from pathlib import Path

import pytest
from tests.unit.models.conftest import MakeWheel

from llmos.errors import ConfigError, HashMismatch, NetworkError
from llmos.models.wheels import fetch


def test_a_wheel_is_downloaded_once_and_then_taken_from_the_cache(
    make_wheel: MakeWheel, tmp_path: Path
) -> None:
    sha256, source = make_wheel("tinydata", {"tinydata/rows.txt": b"rows"})
    content = source.read_bytes()

    first = fetch("tinydata", "1.0", sha256, tmp_path / "cache")
    source.unlink()  # pip could not deliver it again
    second = fetch("tinydata", "1.0", sha256, tmp_path / "cache")

    assert first == second
    assert second.read_bytes() == content


def test_a_download_that_is_not_the_pinned_file_is_deleted(
    make_wheel: MakeWheel, tmp_path: Path
) -> None:
    sha256, _ = make_wheel("tinydata", {"tinydata/rows.txt": b"rows"})
    make_wheel("tinydata", {"tinydata/rows.txt": b"other rows"})

    with pytest.raises(HashMismatch, match=sha256):
        fetch("tinydata", "1.0", sha256, tmp_path / "cache")

    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []


def test_a_cached_file_that_was_changed_is_deleted(make_wheel: MakeWheel, tmp_path: Path) -> None:
    sha256, _ = make_wheel("tinydata", {"tinydata/rows.txt": b"rows"})
    kept = fetch("tinydata", "1.0", sha256, tmp_path / "cache")
    kept.write_bytes(kept.read_bytes() + b"x")

    with pytest.raises(HashMismatch):
        fetch("tinydata", "1.0", sha256, tmp_path / "cache")
    assert not kept.exists()
    assert fetch("tinydata", "1.0", sha256, tmp_path / "cache") == kept


def test_without_an_index_the_error_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_RETRIES", "0")

    with pytest.raises(NetworkError, match="tinydata") as caught:
        fetch("tinydata", "1.0", "0" * 64, tmp_path)
    assert "network" in caught.value.hint


def test_a_package_that_no_index_has_is_a_network_error(
    make_wheel: MakeWheel, tmp_path: Path
) -> None:
    make_wheel("tinydata", {})
    with pytest.raises(NetworkError, match="No matching distribution"):
        fetch("otherdata", "1.0", "0" * 64, tmp_path)


def test_a_python_without_pip_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare/bin/python"))
    with pytest.raises(ConfigError, match="has no pip"):
        fetch("tinydata", "1.0", "0" * 64, tmp_path)
