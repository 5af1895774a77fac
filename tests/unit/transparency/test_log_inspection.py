"""Inspection names the place that was changed, needs no key, and leaves every byte as it was."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.crypto.notes import Checkpoint, NoteKey, open_note, sign_note
from llmos.errors import HomeMissing, StorageError
from llmos.kernel.auditlog import AuditLog
from llmos.kernel.schema import KERNEL, standing_digest
from llmos.kernel.store import Store
from llmos.transparency.log_inspection import MOST_DIFFERENCES, inspect

KEY = NoteKey("llmos.local/0123", bytes(range(32)))
STRANGER = NoteKey("llmos.local/0123", bytes(32))
SIZE = 13


def make(home: Path, size: int = SIZE) -> Path:
    home.mkdir(exist_ok=True)
    (home / "home.pub").write_text(f"{STRANGER.vkey}\n{KEY.vkey}\n")
    log = AuditLog(Store.open(home / "kernel.db", KERNEL), KEY)
    with log.store.transaction() as conn:
        log.append_all(conn, ({"number": number} for number in range(size)))
    log.store.close()
    return home


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make(tmp_path / "home")


def change(home: Path, *statements: str, **values: Any) -> None:
    with closing(sqlite3.connect(home / "kernel.db")) as database, database:
        for statement in statements:
            database.execute(statement, values)


def differences(home: Path) -> set[str]:
    return {str(difference) for difference in inspect(home).differences}


def resigned(home: Path, make_note: Callable[[Checkpoint], str]) -> None:
    with closing(sqlite3.connect(home / "kernel.db")) as database:
        (note,) = database.execute("SELECT note FROM log_checkpoints").fetchone()
    head = Checkpoint.parse(open_note(note, KEY.verifier))
    change(home, "UPDATE log_checkpoints SET note = :note", note=make_note(head))


def test_a_sound_log_has_no_differences(home: Path) -> None:
    found = inspect(home)
    assert (found.entries, found.signature_checked, found.entries_as_signed) == (SIZE, True, True)
    assert found.differences == ()


NO_HASH = "it does not have the hash that the tree holds for it"
NOT_ITS_HASH = "it is not the hash of the two below it"
OTHER_ROOT = "checkpoint of 13 entries: its root is not that of the entries"

# what was done -> all that is said, and whether the entries are still those that were signed
DAMAGE: dict[str, tuple[set[str], bool]] = {
    "UPDATE log_entries SET data = x'7b7d' WHERE idx = 3": (
        {f"entry 3: {NO_HASH}", OTHER_ROOT},
        False,
    ),
    "UPDATE log_entries SET data = 'text' WHERE idx = 3": (
        {f"entry 3: {NO_HASH}", OTHER_ROOT},
        False,
    ),
    "DELETE FROM log_entries WHERE idx IN (4, 5)": (
        {"entry 4: it is missing", "entry 5: it is missing"},
        False,
    ),
    "DELETE FROM log_entries WHERE idx = 12": (
        {
            "count: the log has 12 entries and its newest checkpoint says 13",
            "hash of level 0, place 12: it belongs to no entry",
        },
        False,
    ),
    "INSERT INTO log_entries VALUES (-1, x'7b7d')": (
        {"entry -1: no entry has such a number"},
        True,
    ),
    "INSERT INTO log_entries VALUES ('x', x'7b7d')": (
        {"entry x: no entry has such a number"},
        True,
    ),
    "UPDATE log_nodes SET hash = zeroblob(32) WHERE level = 0 AND idx = 3": (
        {f"entry 3: {NO_HASH}", f"hash of level 1, place 1: {NOT_ITS_HASH}"},
        True,
    ),
    "UPDATE log_nodes SET hash = zeroblob(32) WHERE level = 1 AND idx = 1": (
        {
            f"hash of level 1, place 1: {NOT_ITS_HASH}",
            f"hash of level 2, place 0: {NOT_ITS_HASH}",
        },
        True,
    ),
    "DELETE FROM log_nodes WHERE level = 0 AND idx = 3": (
        {"entry 3: the tree holds no hash of it"},
        True,
    ),
    "DELETE FROM log_nodes WHERE level = 1": (
        {f"hash of level 1, place {place}: it is missing" for place in range(6)},
        True,
    ),
    "DELETE FROM log_nodes WHERE level = 3": ({"hash of level 3, place 0: it is missing"}, True),
    "INSERT INTO log_nodes VALUES (5, 0, zeroblob(32))": (
        {"hash of level 5, place 0: it belongs to no entry"},
        True,
    ),
    "INSERT INTO log_nodes VALUES ('x', 0, zeroblob(32))": (
        {"hash of level x, place 0: it belongs to no entry"},
        True,
    ),
    "DELETE FROM log_checkpoints": ({"checkpoint: there is none that can be read"}, False),
    "UPDATE log_checkpoints SET note = x'00'": (
        {
            "checkpoint of 13 entries: it is not genuine: it is no text",
            "checkpoint: there is none that can be read",
        },
        False,
    ),
    "UPDATE log_checkpoints SET size = 12": (
        {"checkpoint of 12 entries: it was signed for 13 entries"},
        True,
    ),
    "DROP TABLE log_nodes": (
        {"kernel.db: it cannot be read as a database: no such table: log_nodes"},
        False,
    ),
}


@pytest.mark.parametrize("statement", DAMAGE)
def test_what_was_changed_is_named_and_nothing_else(home: Path, statement: str) -> None:
    change(home, statement)
    said, as_signed = DAMAGE[statement]
    assert differences(home) == said
    assert inspect(home).entries_as_signed is as_signed


@pytest.fixture
def stated(tmp_path: Path) -> Path:
    """Make a log whose newest entry has the digest of the tables beside it."""
    home = make(tmp_path / "stated", 3)
    log = AuditLog(Store.open(home / "kernel.db", KERNEL), KEY)
    with log.store.transaction() as conn:
        log.append(conn, {"state": standing_digest(conn)})
    log.store.close()
    return home


def test_tables_that_no_act_changed_are_named_beside_a_sound_log(stated: Path) -> None:
    assert not inspect(stated).differences
    change(
        stated,
        "INSERT INTO principals (id, name, roles, created_at) VALUES ('1', 'eve', '[]', 'now')",
    )
    found = inspect(stated)
    assert found.entries_as_signed
    assert [str(difference) for difference in found.differences] == [
        "tables: rows of people, keys, data, models or pools were changed by no act"
    ]


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE alembic_version SET version_num = 'of another revision'", None),
        ("DELETE FROM alembic_version", "schema: its revision is not one row"),
        ("DROP TABLE principals", "kernel.db: it cannot be read as a database: no such table"),
        ("UPDATE log_entries SET data = 'x' WHERE idx = 3", "entry 3: it does not have the hash"),
        ("DELETE FROM log_entries WHERE idx = 3", "count: the log has 3 entries and its newest"),
    ],
)
def test_tables_that_cannot_be_compared_are_named_too(
    stated: Path, statement: str, said: str | None
) -> None:
    change(stated, statement)
    found = [str(difference) for difference in inspect(stated).differences]
    assert not [line for line in found if line.startswith("tables")]
    assert not found if said is None else any(line.startswith(said) for line in found)


def test_a_checkpoint_of_another_key_log_or_root_is_named(home: Path) -> None:
    good = (home / "kernel.db").read_bytes()
    for make_note, said in (
        (lambda head: sign_note(head.text(), STRANGER), "not signed by llmos.local/0123"),
        (
            lambda head: sign_note(Checkpoint("other", head.size, head.root).text(), KEY),
            "it is of the log 'other'",
        ),
        (
            lambda head: sign_note(Checkpoint(KEY.name, head.size, bytes(32)).text(), KEY),
            "its root is not that of the entries",
        ),
    ):
        resigned(home, make_note)
        assert any(said in difference for difference in differences(home))
        (home / "kernel.db").write_bytes(good)
    assert differences(home) == set()


def test_without_the_public_key_all_but_signatures_is_compared(home: Path) -> None:
    (home / "home.pub").unlink()
    found = inspect(home)
    assert (found.signature_checked, found.differences) == (False, ())
    resigned(home, lambda _: sign_note(Checkpoint(KEY.name, 13, bytes(32)).text(), STRANGER))
    assert differences(home) == {OTHER_ROOT}
    change(home, "UPDATE log_checkpoints SET note = 'x'")
    assert any("this is not a checkpoint" in difference for difference in differences(home))


def test_a_far_entry_does_not_make_an_endless_list(home: Path) -> None:
    change(home, "INSERT INTO log_entries VALUES (:far, x'7b7d')", far=2**60)
    assert len(inspect(home).differences) == MOST_DIFFERENCES


def test_an_empty_log_of_size_zero_is_compared_too(tmp_path: Path) -> None:
    home = make(tmp_path / "home", size=0)
    assert differences(home) == {"checkpoint: there is none that can be read"}
    root = hashlib.sha256(b"").digest()
    note = sign_note(Checkpoint(KEY.name, 0, root).text(), KEY)
    change(home, "INSERT INTO log_checkpoints VALUES (0, :note)", note=note)
    assert inspect(home).entries_as_signed


def test_every_flipped_bit_is_seen(tmp_path: Path) -> None:
    home = make(tmp_path / "home")
    with closing(sqlite3.connect(home / "kernel.db")) as database:
        cells = [
            (table, column, row_id, value)
            for table, column in (("log_entries", "data"), ("log_nodes", "hash"))
            for row_id, value in database.execute(f"SELECT rowid, {column} FROM {table}")  # noqa: S608
        ]

    @settings(max_examples=40, deadline=None)
    @given(st.sampled_from(cells), st.integers(min_value=0))
    def flipped(cell: tuple[str, str, int, bytes], position: int) -> None:
        table, column, row_id, value = cell
        bad = bytearray(value)
        bit = position % (8 * len(bad))
        bad[bit // 8] ^= 1 << bit % 8
        statement = f"UPDATE {table} SET {column} = :value WHERE rowid = {row_id}"  # noqa: S608
        change(home, statement, value=bytes(bad))
        assert inspect(home).differences
        change(home, statement, value=value)
        assert not inspect(home).differences

    flipped()


def test_inspection_changes_nothing_and_sees_what_is_not_in_the_file_yet(home: Path) -> None:
    log = AuditLog(Store.open(home / "kernel.db", KERNEL), KEY)
    with log.store.transaction() as conn:  # lies in the write-ahead log while the store is open
        log.append(conn, {"number": SIZE})
    before = {path.name: path.read_bytes() for path in home.iterdir()}
    assert "kernel.db-wal" in before
    assert inspect(home).entries == SIZE + 1
    assert {path.name: path.read_bytes() for path in home.iterdir()} == before
    log.store.close()


def test_a_home_that_cannot_be_inspected_says_why(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HomeMissing, match=r"no kernel\.db"):
        inspect(tmp_path / "nowhere")
    good = (home / "kernel.db").read_bytes()
    (home / "kernel.db").write_bytes(os.urandom(5000))
    assert any("cannot be read as a database" in difference for difference in differences(home))
    (home / "kernel.db").write_bytes(good)
    with monkeypatch.context() as patch:
        real = shutil.copyfile

        def write_after_copy(source: Path, target: Path) -> None:
            real(source, target)
            with source.open("ab") as file:
                file.write(b"x")

        patch.setattr(shutil, "copyfile", write_after_copy)
        with pytest.raises(StorageError, match="being written all the time"):
            inspect(home)
    (home / "kernel.db-wal").mkdir()
    with pytest.raises(StorageError, match=r"kernel\.db cannot be used: Is a directory"):
        inspect(home)
