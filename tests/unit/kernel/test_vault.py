"""The vault: closed to everyone without key and grant; full disks and deletions leave nothing."""

from __future__ import annotations

import io
import json
import os
import resource
import secrets
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import select, update
from tests.databases import on_disk, open_store

from llmos.errors import PermissionDenied, StorageError, StorageFull, TamperedObject
from llmos.kernel.schema import KEYS, object_keys, sealed_secrets
from llmos.kernel.store import Store
from llmos.kernel.vault import Vault

pytestmark = pytest.mark.databases

ROOT_KEY = bytes(range(32))


@dataclass(frozen=True, slots=True)
class Only:
    """A grant for one object."""

    object_id: str

    def permits(self, object_id: str) -> bool:
        return object_id == self.object_id


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(tmp_path / "keys.db", KEYS, busy_timeout_s=2)
    yield opened
    opened.close()


@pytest.fixture
def vault(tmp_path: Path, store: Store) -> Vault:
    return Vault(tmp_path, store, ROOT_KEY)


def files(home: Path) -> list[Path]:
    return [path for path in (home / "objects").rglob("*") if path.is_file()]


def file_of(home: Path, object_id: str) -> Path:
    return home / "objects" / object_id[:2] / object_id


def key_rows(store: Store) -> list[tuple[str, bytes]]:
    with store.read() as conn:
        rows = conn.execute(select(object_keys.c.object_id, object_keys.c.wrapped_key))
        return [(str(row[0]), bytes(row[1])) for row in rows]


@pytest.mark.parametrize("size", [0, 5, 16384, 700_000])
def test_what_was_put_is_read(vault: Vault, size: int) -> None:
    plain = secrets.token_bytes(size)
    for source in (plain, io.BytesIO(plain)):
        object_id = vault.put("checkpoint", source)
        assert vault.read(object_id, "checkpoint", Only(object_id)) == plain
        with vault.open(object_id, "checkpoint", Only(object_id)) as stream:
            assert stream.read() == plain
            stream.seek(size // 2)
            assert stream.read() == plain[size // 2 :]


def test_nothing_readable_is_on_the_disk(vault: Vault, store: Store, tmp_path: Path) -> None:
    text = b"the patient has a rare disease"
    object_id = vault.put("records", text * 100)
    vault.seal_secret("pepper", text)
    store.checkpoint()
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or text not in path.read_bytes()
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 or path.parent == tmp_path
    assert stat.S_IMODE(file_of(tmp_path, object_id).stat().st_mode) == 0o600
    assert [path.name for path in files(tmp_path)] == [object_id]


def test_objects_share_folders(vault: Vault, tmp_path: Path) -> None:
    for number in range(256):
        (tmp_path / "objects" / f"{number:02x}").mkdir(parents=True)
    object_id = vault.put("records", b"x")
    assert vault.read(object_id, "records", Only(object_id)) == b"x"


def test_lines_are_read_as_a_stream(vault: Vault) -> None:
    lines = [b"%d\n" % number for number in range(50_000)]
    object_id = vault.put("records", b"".join(lines))
    with vault.open(object_id, "records", Only(object_id)) as stream:
        assert list(stream) == lines


def test_no_grant_no_object(vault: Vault) -> None:
    mine, other = vault.put("records", b"a"), vault.put("records", b"b")
    for look in (vault.read, vault.open):
        with pytest.raises(PermissionDenied, match=other):
            cast("Any", look)(other, "records", Only(mine))


def test_an_object_is_of_its_kind_only(vault: Vault) -> None:
    object_id = vault.put("canaries", b"secret")
    for look in (vault.read, vault.open):
        with pytest.raises(TamperedObject):
            cast("Any", look)(object_id, "records", Only(object_id))


@pytest.mark.parametrize("kind", ["", "Records", "a|b", "a/b", "../x", "1a"])
def test_kinds_are_plain_words(vault: Vault, kind: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind"):
        vault.put(kind, b"")
    assert not (tmp_path / "objects").exists()


@pytest.mark.parametrize("object_id", ["", "..", "../../etc/passwd", "a" * 31, "A" * 32])
def test_ids_are_never_paths(vault: Vault, object_id: str) -> None:
    with pytest.raises(ValueError, match="object id"):
        vault.delete(object_id)
    with pytest.raises(StorageError, match="there is no object"):
        vault.read(object_id, "records", Only(object_id))


def test_another_root_key_opens_nothing(vault: Vault, store: Store, tmp_path: Path) -> None:
    object_id = vault.put("records", b"x")
    vault.seal_secret("pepper", b"y")
    stranger = Vault(tmp_path, store, bytes(32))
    with pytest.raises(TamperedObject):
        stranger.read(object_id, "records", Only(object_id))
    with pytest.raises(TamperedObject):
        stranger.secret("pepper")


def test_exchanged_files_and_keys_are_seen(vault: Vault, store: Store, tmp_path: Path) -> None:
    first, second = vault.put("records", b"first"), vault.put("records", b"second")
    stolen = file_of(tmp_path, second).read_bytes()
    file_of(tmp_path, first).write_bytes(stolen)
    for look in (vault.read, vault.open):
        with pytest.raises(TamperedObject):
            cast("Any", look)(first, "records", Only(first))
    # the key of the second object under the name of the first, too
    with store.transaction() as conn:
        wrapped = dict(key_rows(store))[second]
        conn.execute(update(object_keys).filter_by(object_id=first).values(wrapped_key=wrapped))
    with pytest.raises(TamperedObject):
        vault.read(first, "records", Only(first))
    assert vault.read(second, "records", Only(second)) == b"second"


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "empty", "remove"])
def test_damaged_files_are_seen(vault: Vault, tmp_path: Path, damage: str) -> None:
    object_id = vault.put("records", bytes(20_000))
    path = file_of(tmp_path, object_id)
    data = path.read_bytes()
    flipped = data[:60] + bytes([data[60] ^ 1]) + data[61:]
    if damage == "remove":
        path.unlink()
    else:
        new = {"flip": flipped, "cut": data[:-1], "grow": data + b"x", "empty": b""}
        path.write_bytes(new[damage])
    with pytest.raises(TamperedObject):
        vault.read(object_id, "records", Only(object_id))
    with pytest.raises(TamperedObject):
        vault.open(object_id, "records", Only(object_id)).read()


def test_a_file_that_cannot_be_opened_is_a_storage_error(vault: Vault, tmp_path: Path) -> None:
    object_id = vault.put("records", b"x")
    path = file_of(tmp_path, object_id)
    path.unlink()
    path.symlink_to(path)  # a loop
    with pytest.raises(StorageError, match="symbolic links"):
        vault.read(object_id, "records", Only(object_id))


def test_a_file_that_cannot_be_removed_is_a_refusal_after_the_key_is_destroyed(
    vault: Vault, store: Store, tmp_path: Path
) -> None:
    object_id = vault.put("adapter", b"weights")
    path = file_of(tmp_path, object_id)
    path.unlink()
    path.mkdir()  # stands for a file that the disk does not give up
    with pytest.raises(StorageError, match="the file of the deleted object"):
        vault.delete(object_id)
    assert key_rows(store) == []
    path.rmdir()
    vault.delete(object_id)


def test_a_deleted_object_is_gone_for_ever(vault: Vault, store: Store, tmp_path: Path) -> None:
    gone, kept = vault.put("records", b"gone"), vault.put("records", b"kept")
    wrapped = dict(key_rows(store))[gone]
    backup = file_of(tmp_path, gone).read_bytes()
    assert wrapped in on_disk(tmp_path / "keys.db")
    vault.delete(gone)
    assert wrapped not in on_disk(tmp_path / "keys.db")
    assert [path.name for path in files(tmp_path)] == [kept]
    file_of(tmp_path, gone).write_bytes(backup)
    with pytest.raises(StorageError, match="there is no object"):
        vault.read(gone, "records", Only(gone))
    vault.delete(gone)  # again: finishes what was interrupted
    assert [path.name for path in files(tmp_path)] == [kept]
    assert vault.read(kept, "records", Only(kept)) == b"kept"


def test_the_file_stays_while_the_key_cannot_be_erased(
    vault: Vault, store: Store, tmp_path: Path
) -> None:
    object_id = vault.put("records", b"x")
    with store.read() as conn:
        conn.execute(select(object_keys)).all()  # a reader keeps its snapshot
        with pytest.raises(StorageError, match="someone is reading"):
            vault.delete(object_id)
    assert files(tmp_path) != []
    vault.delete(object_id)
    assert files(tmp_path) == []


def test_a_file_that_does_not_fit_leaves_no_trace(
    vault: Vault, store: Store, tmp_path: Path
) -> None:
    before = vault.put("records", b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # bytes a file may have
    try:
        with pytest.raises(StorageFull, match="no room for a new checkpoint object") as caught:
            vault.put("checkpoint", bytes(3 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "free some space" in caught.value.hint
    assert [path.name for path in files(tmp_path)] == [before]
    assert [row[0] for row in key_rows(store)] == [before]
    after = vault.put("checkpoint", bytes(3 << 20))
    assert vault.read(before, "records", Only(before)) == b"before"
    assert vault.read(after, "checkpoint", Only(after)) == bytes(3 << 20)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_leaves_no_trace(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "none", str(tmp_path)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        store = open_store(tmp_path / "keys.db", KEYS)
        vault = Vault(tmp_path, store, ROOT_KEY)
        before = vault.put("records", b"before")
        with pytest.raises(StorageFull):
            vault.put("checkpoint", bytes(8 << 20))
        assert [path.name for path in files(tmp_path)] == [before]
        assert [row[0] for row in key_rows(store)] == [before]
        assert vault.read(before, "records", Only(before)) == b"before"
        store.close()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


class Broken(io.RawIOBase):
    """A source that fails in the middle."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error, self.reads = error, 0

    def read(self, size: int = -1) -> bytes:
        self.reads += 1
        if self.reads > 2:
            raise self.error
        return bytes(size)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), OSError(5, "I/O error")])
def test_an_interrupted_put_leaves_no_trace(
    vault: Vault, store: Store, tmp_path: Path, error: BaseException
) -> None:
    expected = StorageError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        vault.put("checkpoint", cast("Any", Broken(error)))
    assert files(tmp_path) == []
    assert key_rows(store) == []


def test_a_put_whose_key_cannot_be_stored_leaves_no_trace(
    vault: Vault, store: Store, tmp_path: Path
) -> None:
    with store.transaction(), pytest.raises(StorageError, match="inside another one"):
        vault.put("records", b"x")
    assert files(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from llmos.kernel.schema import KEYS
from tests.databases import on_disk, open_store
from llmos.kernel.vault import Vault
class Deadly:
    reads = 0
    def read(self, size):
        self.reads += 1
        if self.reads > 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return bytes(size)
home = Path(sys.argv[1])
Vault(home, open_store(home / "keys.db", KEYS), bytes(range(32))).put("checkpoint", Deadly())
"""


def test_what_a_killed_process_left_is_swept(vault: Vault, tmp_path: Path) -> None:
    kept = vault.put("records", b"kept")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == -9
    assert len(files(tmp_path)) == 2
    assert vault.sweep() == 0  # young: it may belong to a living process
    assert vault.sweep(older_than_s=-60.0) == 1
    assert [path.name for path in files(tmp_path)] == [kept]
    assert vault.read(kept, "records", Only(kept)) == b"kept"


def test_a_secret_is_sealed_once(vault: Vault, store: Store) -> None:
    vault.seal_secret("log-key", b"seed")
    assert vault.secret("log-key") == b"seed"
    with pytest.raises(StorageError, match="already"):
        vault.seal_secret("log-key", b"other")
    assert vault.secret("log-key") == b"seed"
    with pytest.raises(StorageError, match="no secret 'pepper'"):
        vault.secret("pepper")
    with store.transaction() as conn:
        conn.execute(update(sealed_secrets).values(name="pepper"))
    with pytest.raises(TamperedObject):
        vault.secret("pepper")


def test_the_root_key_is_not_kept(vault: Vault) -> None:
    held = [getattr(vault, name) for name in vars(vault)]
    assert ROOT_KEY not in held
    assert ROOT_KEY.hex() not in json.dumps(held, default=repr)


def test_a_destroyed_secret_is_gone_from_every_file_and_its_name_is_free(
    vault: Vault, store: Store, tmp_path: Path
) -> None:
    vault.seal_secret("a", b"first")
    with store.read() as conn:
        sealed = conn.execute(select(sealed_secrets.c.sealed)).scalar_one()
    vault.destroy_secret("a")
    with pytest.raises(StorageError, match="no secret"):
        vault.secret("a")
    assert sealed not in on_disk(tmp_path / "keys.db")
    vault.destroy_secret("a")
    vault.seal_secret("a", b"second")
    assert vault.secret("a") == b"second"
