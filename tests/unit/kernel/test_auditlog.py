"""The log: every entry is proven, every change to any row is seen, two processes share it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, delete, event, insert, select, update
from tests.databases import open_store

from llmos.crypto import merkle
from llmos.crypto.notes import Checkpoint, NoteKey, open_note, sign_note
from llmos.errors import IntegrityError, RequestError, StorageError, TamperedLog, VerificationFailed
from llmos.kernel import auditlog
from llmos.kernel.auditlog import AuditLog
from llmos.kernel.schema import KERNEL, log_checkpoints, log_cosignatures, log_entries, log_nodes
from llmos.kernel.store import Store
from llmos.transparency.audit_paths import verify_consistency
from llmos.transparency.proofs import LogProof, prove, prove_consistency, verify_proof

pytestmark = pytest.mark.databases

KEY = NoteKey("llmos.local/0123", bytes(range(32)))
STRANGER = NoteKey("llmos.local/0123", bytes(32))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(tmp_path / "kernel.db", KERNEL, busy_timeout_s=30.0)
    yield opened
    opened.close()


@pytest.fixture
def log(store: Store) -> AuditLog:
    return AuditLog(store, KEY)


def entry(number: int) -> dict[str, Any]:
    return {
        "v": 1,
        "at": "2026-01-01T00:00:00.000Z",
        "actor": "ada",
        "action": "measure",
        "resource": "Model::ward",
        "outcome": "done",
        "details": {"number": number, "epsilon": 0.5},
    }


def fill(log: AuditLog, count: int) -> None:
    with log.store.transaction() as conn:
        for number in range(count):
            log.append(conn, entry(number))


def note_of(log: AuditLog) -> str:
    with log.store.read() as conn:
        note: str = conn.execute(select(log_checkpoints.c.note)).scalar_one()
    return note


def test_entries_are_numbered_and_read_back_in_order(log: AuditLog) -> None:
    with log.store.transaction() as conn:
        assert [log.append(conn, entry(n)) for n in range(5)] == [0, 1, 2, 3, 4]
    assert [(e.index, e.fields) for e in log.entries()] == [(n, entry(n)) for n in range(5)]
    assert [e.index for e in log.entries(after=1, limit=2)] == [2, 3]
    assert log.entries(after=4) == []


def test_an_entry_is_stored_as_canonical_json(log: AuditLog) -> None:
    fill(log, 1)
    with log.store.read() as conn:
        data = conn.execute(select(log_entries.c.data)).scalar_one()
    assert data.startswith(b'{"action":"measure","actor":"ada","at":"2026-01-01T00:00:00.000Z"')


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**60, b"bytes", object()])
def test_an_entry_that_is_no_json_is_refused_and_nothing_is_written(
    log: AuditLog, value: object
) -> None:
    fill(log, 1)
    with pytest.raises(ValueError, match=r"."), log.store.transaction() as conn:
        log.append(conn, {"details": value})
    assert log.verify().size == 1


@given(st.lists(st.integers(0, 40), max_size=6))
@settings(max_examples=25, deadline=None)
def test_any_batches_make_the_tree_that_single_entries_make(sizes: list[int]) -> None:
    with TemporaryDirectory() as folder:
        store = open_store(Path(folder) / "kernel.db", KERNEL)
        log, grown = AuditLog(store, KEY), 0
        for size in sizes:
            with store.transaction() as conn:
                added = log.append_all(conn, map(entry, range(grown, grown + size)))
            assert added == range(grown, grown + size)
            grown += size
        leaves = [rfc8785.dumps(entry(number)) for number in range(grown)]
        if leaves:
            assert log.verify() == Checkpoint(KEY.name, grown, plain_root(leaves))
        assert [e.fields for e in log.entries(limit=1000)] == [entry(n) for n in range(grown)]
        store.close()


def plain_root(leaves: list[bytes]) -> bytes:
    """Write RFC 6962 section 2.1 down as it reads."""
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    k = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\1" + plain_root(leaves[:k]) + plain_root(leaves[k:])).digest()


def test_a_batch_is_whole_or_not_at_all(log: AuditLog) -> None:
    fill(log, 1)
    with pytest.raises(ValueError, match=r"."), log.store.transaction() as conn:
        log.append_all(conn, [entry(1), {"details": float("nan")}])
    assert log.verify().size == 1
    with log.store.transaction() as conn:
        assert log.append_all(conn, []) == range(1, 1)
        assert list(log.append_all(conn, [entry(1), entry(2)])) == [1, 2]
    assert log.verify().size == 3


def test_a_batch_is_signed_once(log: AuditLog) -> None:
    with log.store.transaction() as conn:
        asked: list[str] = []
        event.listen(conn, "before_cursor_execute", lambda *call: asked.append(call[2]))
        log.append_all(conn, map(entry, range(100)))
    assert len([text for text in asked if text.startswith("INSERT INTO log_checkpoints")]) == 1
    assert len(asked) < 10


def test_an_act_that_fails_leaves_no_entry(log: AuditLog) -> None:
    fill(log, 3)
    with pytest.raises(ZeroDivisionError), log.store.transaction() as conn:
        assert log.append(conn, entry(3)) // 0  # the act fails after its record was written
    assert log.check().size == len(log.entries()) == 3


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 33])
def test_every_entry_of_every_size_is_proven_offline(log: AuditLog, size: int) -> None:
    fill(log, size)
    for index in range(size):
        proof = prove(log, index)
        read = LogProof.from_dict(json.loads(json.dumps(proof.to_dict())))
        assert verify_proof(read, KEY.verifier) == entry(index)
        with pytest.raises(VerificationFailed):
            verify_proof(read, STRANGER.verifier)
    for index in (-1, size):
        with pytest.raises(RequestError, match=f"no entry {index}"):
            prove(log, index)


def test_the_log_only_grows(log: AuditLog) -> None:
    checkpoints = []
    for number in range(20):
        with log.store.transaction() as conn:
            log.append(conn, entry(number))
        checkpoints.append(Checkpoint.parse(open_note(note_of(log), KEY.verifier)))
    head = log.check()
    assert head == checkpoints[-1]
    for old in checkpoints:
        proof = prove_consistency(log, old.size)
        assert verify_consistency(old.size, head.size, old.root, head.root, proof)
    for size in (-1, 21):
        with pytest.raises(RequestError, match="never had"):
            prove_consistency(log, size)


def test_only_the_newest_checkpoint_is_kept(log: AuditLog) -> None:
    fill(log, 9)
    with log.store.read() as conn:
        assert conn.execute(select(log_checkpoints.c.size)).scalars().all() == [9]


def test_an_older_checkpoint_is_proven_against_while_it_continues(log: AuditLog) -> None:
    fill(log, 5)
    kept = note_of(log)
    assert log.checkpoint() == kept
    fill(log, 4)
    assert log.checkpoint() == note_of(log) != kept
    for index in range(5):
        proof = prove(log, index, kept=kept)
        assert (proof.size, proof.checkpoint_note) == (5, kept)
        assert verify_proof(proof, KEY.verifier) == entry(index)
    with pytest.raises(RequestError, match="no entry 5"):
        prove(log, 5, kept=kept)
    for note in (sign_note(Checkpoint(KEY.name, 5, bytes(32)).text(), STRANGER), "x"):
        with pytest.raises(VerificationFailed):
            prove(log, 0, kept=note)
    with pytest.raises(TamperedLog):
        prove(log, 0, kept=sign_note(Checkpoint(KEY.name, 5, bytes(32)).text(), KEY))
    old, newer = (Checkpoint.parse(open_note(n, KEY.verifier)) for n in (kept, note_of(log)))
    middle = plain_root([rfc8785.dumps(e.fields) for e in log.entries(limit=7)])
    assert verify_consistency(5, 7, old.root, middle, prove_consistency(log, 5, 7))
    assert verify_consistency(5, 9, old.root, newer.root, prove_consistency(log, 5))
    for sizes in ((6, 5), (5, 10), (-1, 5)):
        with pytest.raises(RequestError, match="never had"):
            prove_consistency(log, *sizes)


def test_a_cosigned_checkpoint_is_kept_and_compared(log: AuditLog) -> None:
    fill(log, 5)
    with log.store.transaction() as conn:
        conn.execute(insert(log_cosignatures).values(size=5, partner="bo", line="x"))
    for _ in range(2):
        fill(log, 2)
    with log.store.read() as conn:
        assert conn.execute(select(log_checkpoints.c.size)).scalars().all() == [5, 9]
    assert log.verify().size == 9
    for bad in (
        sign_note(Checkpoint(KEY.name, 5, bytes(32)).text(), KEY),
        sign_note(Checkpoint(KEY.name, 5, bytes(32)).text(), STRANGER),
        sign_note(Checkpoint(KEY.name, 50, bytes(32)).text(), KEY),
    ):
        with log.store.transaction() as conn:
            conn.execute(update(log_checkpoints).filter_by(size=5).values(note=bad))
        with pytest.raises(TamperedLog):
            log.verify()


def test_verify_covers_more_than_one_batch(log: AuditLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auditlog, "_BATCH_ENTRIES", 5)
    fill(log, 33)
    assert log.verify() == log.check()
    for index in (4, 5, 31, 32):
        with log.store.transaction() as conn:
            old = conn.execute(select(log_entries.c.data).filter_by(idx=index)).scalar_one()
            conn.execute(update(log_entries).filter_by(idx=index).values(data=old + b" "))
        with pytest.raises(TamperedLog):
            log.verify()
        with log.store.transaction() as conn:
            conn.execute(update(log_entries).filter_by(idx=index).values(data=old))
    assert log.verify().size == 33


Damage = Callable[[Connection], object]

# Seen at start-up and at the next append, before anything new is signed.
SEEN_AT_ONCE: dict[str, Damage] = {
    "last entry removed": lambda c: c.execute(delete(log_entries).filter_by(idx=6)),
    "entry added": lambda c: c.execute(insert(log_entries).values(idx=7, data=b"{}")),
    "all entries removed": lambda c: c.execute(delete(log_entries)),
    "frontier hash changed": lambda c: c.execute(
        update(log_nodes).filter_by(level=2, idx=0).values(hash=bytes(32))
    ),
    "frontier hash removed": lambda c: c.execute(delete(log_nodes).filter_by(level=1, idx=2)),
    "checkpoint removed": lambda c: c.execute(delete(log_checkpoints)),
    "checkpoint garbled": lambda c: c.execute(update(log_checkpoints).values(note="x")),
    "checkpoint of another key": lambda c: c.execute(
        update(log_checkpoints).values(note=sign_note(head_of(c).text(), STRANGER))
    ),
    "checkpoint of another log": lambda c: c.execute(
        update(log_checkpoints).values(
            note=sign_note(Checkpoint("other", 7, head_of(c).root).text(), KEY)
        )
    ),
    "checkpoint of another size": lambda c: c.execute(
        update(log_checkpoints).values(
            note=sign_note(Checkpoint(KEY.name, 6, head_of(c).root).text(), KEY)
        )
    ),
    "checkpoint of another root": lambda c: c.execute(
        update(log_checkpoints).values(
            note=sign_note(Checkpoint(KEY.name, 7, bytes(32)).text(), KEY)
        )
    ),
}
# Seen at start-up, by counting and by recomputing.
SEEN_AT_START: dict[str, Damage] = {
    "middle entry removed": lambda c: c.execute(delete(log_entries).filter_by(idx=3)),
    "middle hash removed": lambda c: c.execute(delete(log_nodes).filter_by(level=0, idx=3)),
    "hash added": lambda c: c.execute(insert(log_nodes).values(level=5, idx=0, hash=bytes(32))),
    "entry before the first": lambda c: c.execute(insert(log_entries).values(idx=-1, data=b"{}")),
    "entry changed": lambda c: c.execute(update(log_entries).filter_by(idx=3).values(data=b"{}")),
    "hash changed": lambda c: c.execute(
        update(log_nodes).filter_by(level=0, idx=3).values(hash=bytes(32))
    ),
    "inner hash changed": lambda c: c.execute(
        update(log_nodes).filter_by(level=1, idx=0).values(hash=bytes(32))
    ),
    "entry and its hash changed": lambda c: (
        c.execute(update(log_entries).filter_by(idx=3).values(data=b"{}")),
        c.execute(update(log_nodes).filter_by(level=0, idx=3).values(hash=merkle.leaf_hash(b"{}"))),
    ),
    "entry moved before the first": lambda c: c.execute(
        update(log_entries).filter_by(idx=3).values(idx=-1)
    ),
    "hash moved": lambda c: c.execute(update(log_nodes).filter_by(level=0, idx=3).values(idx=9)),
    "entries exchanged": lambda c: [
        c.execute(update(log_entries).filter_by(idx=a).values(idx=b))
        for a, b in ((2, 99), (3, 2), (99, 3))
    ],
}


def head_of(conn: Connection) -> Checkpoint:
    note = conn.execute(select(log_checkpoints.c.note)).scalar_one()
    return Checkpoint.parse(open_note(note, KEY.verifier))


@pytest.mark.parametrize("name", SEEN_AT_ONCE)
def test_damage_seen_at_once(log: AuditLog, name: str) -> None:
    fill(log, 7)
    with log.store.transaction() as conn:
        SEEN_AT_ONCE[name](conn)
    for look in (log.check, log.verify, lambda: prove(log, 0), lambda: prove_consistency(log, 1)):
        with pytest.raises(TamperedLog) as caught:
            look()
        assert "restore kernel.db" in caught.value.hint
    with pytest.raises(TamperedLog), log.store.transaction() as conn:
        log.append(conn, entry(7))


@pytest.mark.parametrize("name", SEEN_AT_START)
def test_damage_seen_at_start(log: AuditLog, name: str) -> None:
    fill(log, 7)
    with log.store.transaction() as conn:
        SEEN_AT_START[name](conn)
    for look in (log.check, log.verify):
        with pytest.raises(TamperedLog):
            look()


def test_the_start_looks_at_the_newest_entries_and_verify_at_all(
    log: AuditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auditlog, "CHECKED_ENTRIES", 10)
    fill(log, 33)
    for index, at_start in ((22, False), (23, True), (32, True)):
        with log.store.transaction() as conn:
            old = conn.execute(select(log_entries.c.data).filter_by(idx=index)).scalar_one()
            conn.execute(update(log_entries).filter_by(idx=index).values(data=old + b" "))
        if at_start:
            with pytest.raises(TamperedLog):
                log.check()
        else:
            assert log.check().size == 33
        with pytest.raises(TamperedLog):
            log.verify()
        with log.store.transaction() as conn:
            conn.execute(update(log_entries).filter_by(idx=index).values(data=old))
    assert log.verify() == log.check()


def test_a_changed_entry_is_neither_shown_nor_proven(log: AuditLog) -> None:
    fill(log, 7)
    with log.store.transaction() as conn:
        conn.execute(update(log_entries).filter_by(idx=3).values(data=b"{}"))
        conn.execute(delete(log_entries).filter_by(idx=1))
        conn.execute(delete(log_nodes).filter_by(level=0, idx=5))
    with pytest.raises(TamperedLog, match="entry 3 was changed"):
        log.entries()
    with pytest.raises(TamperedLog, match="entry 5 was changed"):
        log.entries(after=3)
    with pytest.raises(TamperedLog, match="entry 3"):
        prove(log, 3)
    with pytest.raises(TamperedLog, match="entry 1 is missing"):
        prove(log, 1)
    with pytest.raises(TamperedLog, match="level 0, place 5 is missing"):
        prove(log, 4)


def test_every_flipped_bit_of_every_row_is_seen(log: AuditLog) -> None:
    fill(log, 7)
    columns = [(log_entries, "data"), (log_nodes, "hash"), (log_checkpoints, "note")]
    with log.store.read() as conn:
        cells = [
            (table, column, row)
            for table, column in columns
            for row in conn.execute(select(table)).mappings().all()
        ]

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, len(cells) - 1), st.integers(min_value=0))
    def flipped(which: int, position: int) -> None:
        table, column, row = cells[which]
        text = isinstance(row[column], str)
        changed = bytearray(row[column].encode() if text else row[column])
        bit = position % (8 * len(changed))
        changed[bit // 8] ^= 1 << bit % 8
        bad = changed.decode("utf-8", "replace") if text else bytes(changed)
        same_row = [table.c[name] == row[name] for name in row if name != column]
        for value, seen in ((bad, pytest.raises(TamperedLog)), (row[column], nullcontext())):
            with log.store.transaction() as conn:
                conn.execute(update(table).where(*same_row).values({column: value}))
            with seen:
                assert log.verify().size == 7

    flipped()


def test_an_empty_log_is_a_wiped_log(log: AuditLog) -> None:
    for look in (log.check, log.verify):
        with pytest.raises(TamperedLog, match="empty"):
            look()
    with pytest.raises(RequestError):
        prove(log, 0)


def test_a_kept_checkpoint_reveals_rewritten_history(log: AuditLog, tmp_path: Path) -> None:
    fill(log, 5)
    kept = note_of(log)
    fill(log, 4)
    assert log.verify(kept=kept).size == 9
    folder = tmp_path / "rewritten"
    folder.mkdir()
    rewritten = AuditLog(open_store(folder / "kernel.db", KERNEL), KEY)
    with rewritten.store.transaction() as conn:
        rewritten.append(conn, entry(0))
    with pytest.raises(TamperedLog, match="has 1 entries and had 5"):
        rewritten.verify(kept=kept)
    with rewritten.store.transaction() as conn:
        for _ in range(8):
            rewritten.append(conn, entry(0))
    assert rewritten.verify().size == 9
    with pytest.raises(TamperedLog, match="first 5 entries"):
        rewritten.verify(kept=kept)
    with pytest.raises(VerificationFailed):
        rewritten.verify(kept=sign_note(Checkpoint(KEY.name, 1, bytes(32)).text(), STRANGER))
    rewritten.store.close()


def test_a_proof_asks_the_database_once_for_all_its_hashes(log: AuditLog) -> None:
    fill(log, 1000)
    asked: list[str] = []
    event.listen(log.store._engine, "before_cursor_execute", lambda *call: asked.append(call[2]))
    assert len(prove(log, 321).hashes) == 10
    assert len(prove_consistency(log, 321)) > 3
    reads = [text for text in asked if "wanted" in text]
    assert len(reads) == 4  # for the root and for the proof, twice


@pytest.mark.sqlite("its query plans")
def test_an_append_never_scans_the_log(log: AuditLog) -> None:
    fill(log, 7)
    with log.store.transaction() as conn:
        asked: list[tuple[str, Any]] = []
        event.listen(conn, "before_cursor_execute", lambda *call: asked.append((call[2], call[3])))
        log.append(conn, entry(7))
        selects = [(text, given) for text, given in asked if text.startswith("SELECT")]
        plans = [
            str(conn.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", given).all())
            for text, given in selects
        ]
    assert len(plans) == 3  # size, checkpoint, and the three subtrees of 7 = 4 + 2 + 1 together
    assert not [plan for plan in plans if "SCAN log_entries" in plan or "SCAN log_nodes" in plan]


def test_reading_never_writes(log: AuditLog) -> None:
    fill(log, 1)
    with pytest.raises(StorageError), log.store.read() as conn:
        log.append(conn, entry(1))
    assert log.verify().size == 1


WRITER = """
import sys
from pathlib import Path
from llmos.crypto.notes import NoteKey
from llmos.kernel.auditlog import AuditLog
from llmos.kernel.schema import KERNEL
from tests.databases import open_store
store = open_store(Path(sys.argv[1]) / "kernel.db", KERNEL)
log = AuditLog(store, NoteKey("llmos.local/0123", bytes(range(32))))
for number in range(15):
    with log.store.transaction() as conn:
        log.append(conn, {"writer": sys.argv[2], "number": number})
"""


def test_processes_write_one_log(log: AuditLog, tmp_path: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), name]) for name in "ab"
    ]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    assert log.verify().size == 30
    for name in "ab":
        numbers = [e.fields["number"] for e in log.entries() if e.fields["writer"] == name]
        assert numbers == list(range(15))


@pytest.mark.sqlite("its columns may hold values of any type")
@pytest.mark.parametrize(
    "change",
    [
        "UPDATE log_entries SET data = CAST(data AS TEXT) WHERE idx = 1",
        "UPDATE log_nodes SET hash = hex(hash) WHERE idx = 1",
        "UPDATE log_checkpoints SET note = CAST(note AS BLOB)",
    ],
)
def test_a_value_of_another_type_is_noticed(log: AuditLog, change: str) -> None:
    """SQLite keeps text where bytes were declared; one flipped bit of a record's header does it."""
    fill(log, 5)
    with log.store.transaction() as conn:
        conn.exec_driver_sql(change)
    with pytest.raises(IntegrityError, match=r"type that was never written|was changed"):
        log.verify()
