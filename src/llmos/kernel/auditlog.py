"""The tamper-evident log: an RFC 6962 tree over canonical JSON entries, signed at every append.

An entry is written in the transaction of the act that it records, so there is no act without a
record and no record without the act. The tree's hashes and the newest signed checkpoint are written
with it; older checkpoints are replaced, except those that partners cosigned: a consistency proof
reaches back to any size.

Protects against: changed, swapped, removed or added rows, by anyone who does not have the log key.
Does not protect against: putting back an older copy of the whole database, or an operator who has
the key and rewrites history. Both are seen by whoever kept an older checkpoint: `verify(kept=...)`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import rfc8785
from sqlalchemy import Connection, and_, bindparam, delete, func, insert, select, text

from llmos.crypto import merkle
from llmos.crypto.notes import Checkpoint, NoteKey, open_note, sign_note
from llmos.errors import TamperedLog, VerificationFailed
from llmos.kernel import schema
from llmos.kernel.schema import log_checkpoints, log_cosignatures, log_entries, log_nodes
from llmos.kernel.store import Store

_Nodes = dict[tuple[int, int], bytes]  # (level, index) -> hash of that complete subtree
ReadNodes = Callable[[Collection[tuple[int, int]]], _Nodes]
CHECKED_ENTRIES: Final = 32_768  # at every start: a quarter of a second
_BATCH_ENTRIES: Final = 4096
# Of all ways to ask for places by one statement the one that uses the index on both databases.
_NODES: Final = (
    "SELECT level, idx, hash FROM (VALUES {}) AS wanted CROSS JOIN log_nodes "
    "WHERE level = column1 AND idx = column2"
)
_LEVEL: Final = (
    select(log_nodes.c.hash)
    .where(log_nodes.c.level == bindparam("at_level"))
    .where(log_nodes.c.idx >= bindparam("start"), log_nodes.c.idx < bindparam("end"))
    .order_by(log_nodes.c.idx)
)
_ENTRIES: Final = (
    select(log_entries.c.idx, log_entries.c.data)
    .where(log_entries.c.idx >= bindparam("start"), log_entries.c.idx < bindparam("end"))
    .order_by(log_entries.c.idx)
)
_HINT: Final = (
    "`llmos log inspect` says what differs; stop using this home and restore kernel.db; "
    "the vault and the models are untouched"
)


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One record with its place in the log."""

    index: int
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class AuditLog:
    """The log of one home; its origin is the name of the key that signs for it."""

    store: Store
    key: NoteKey

    def append(self, conn: Connection, entry: Mapping[str, Any]) -> int:
        """Add one entry inside the caller's transaction and return its index; see `append_all`."""
        return self.append_all(conn, [entry]).start

    def append_all(self, conn: Connection, entries: Iterable[Mapping[str, Any]]) -> range:
        """Add entries under one signature inside the caller's transaction; return their indices.

        The stored tree is checked against the last checkpoint before a new one is signed, so that
        a signature never covers a change that someone else made.

        Raises:
            TamperedLog: the log was changed since its last checkpoint.
            ValueError: an entry is no JSON (RFC 8785); none is added.
        """
        added = [rfc8785.dumps(dict(entry)) for entry in entries]
        head, nodes = self._state(conn)
        indices = range(head.size, head.size + len(added))
        if not added:
            return indices
        new: _Nodes = {}
        for index, data in zip(indices, added, strict=True):
            done = merkle.completed_nodes(index, merkle.leaf_hash(data), lambda *at: nodes[at])
            for level, place, node in done:
                nodes[level, place] = new[level, place] = node
        root = _root(nodes, indices.stop)
        note = sign_note(Checkpoint(self.key.name, indices.stop, root).text(), self.key)
        rows = zip(indices, added, strict=True)
        conn.execute(insert(log_entries), [{"idx": index, "data": data} for index, data in rows])
        conn.execute(
            insert(log_nodes),
            [{"level": level, "idx": place, "hash": node} for (level, place), node in new.items()],
        )
        cosigned = select(log_cosignatures.c.size)
        conn.execute(delete(log_checkpoints).where(log_checkpoints.c.size.not_in(cosigned)))
        conn.execute(insert(log_checkpoints).values(size=indices.stop, note=note))
        return indices

    def check(self) -> Checkpoint:
        """Compare signature, counts, root and the newest `CHECKED_ENTRIES` entries, for start-up.

        Raises:
            TamperedLog: they do not agree, or the log is empty: a home's first entry is its making.
        """
        with self.store.read() as conn:
            head = self._checked(conn)
            _verify_entries(conn, max(0, head.size - CHECKED_ENTRIES), head.size)
            return head

    def verify(self, *, kept: str | None = None) -> Checkpoint:
        """Recompute the whole tree from the entries and compare every stored hash.

        Args:
            kept: a checkpoint note of this log that was kept elsewhere; the log must continue it.

        Raises:
            TamperedLog: anything differs.
            VerificationFailed: `kept` is not a checkpoint that this log signed.
        """
        earlier = [] if kept is None else [self._opened(kept)]
        with self.store.read() as conn:
            head = self._checked(conn)
            earlier += map(self._kept, conn.execute(select(log_checkpoints.c.note)).scalars())
            for old in earlier:
                if old.size > head.size:
                    raise tampered(f"it has {head.size} entries and had {old.size}")
            _verify_entries(conn, 0, head.size)
            for old in earlier:
                if _root(_frontier(conn, old.size), old.size) != old.root:
                    raise tampered(f"its first {old.size} entries are not those it had")
            return head

    def checkpoint(self) -> str:
        """Return the newest checkpoint, signed, after a comparison with the stored tree.

        Raises:
            TamperedLog: they do not agree, or the log is empty.
        """
        with self.store.read() as conn:
            self._checked(conn)
            return str(_newest_note(conn))

    @contextmanager
    def tree(self, kept: str | None = None) -> Iterator[tuple[Checkpoint, str, ReadNodes]]:
        """Yield the newest checkpoint, or `kept`, its note and a reader of the stored tree.

        Raises:
            TamperedLog: the newest checkpoint and the stored tree do not agree.
            VerificationFailed: `kept` is not a checkpoint that this log signed.
        """
        with self.store.read() as conn:
            head, note = self._head(conn), _newest_note(conn)
            if kept is not None:
                head, note = self._opened(kept), kept
            yield head, str(note), partial(_read, conn)

    def entries(self, after: int = -1, limit: int = 100) -> list[LogEntry]:
        """Return up to `limit` entries that follow index `after`, oldest first.

        Raises:
            TamperedLog: an entry does not have the hash that the tree holds for it.
        """
        leaf = and_(log_nodes.c.level == 0, log_nodes.c.idx == log_entries.c.idx)
        rows = (
            select(log_entries.c.idx, log_entries.c.data, log_nodes.c.hash)
            .outerjoin(log_nodes, leaf)
            .where(log_entries.c.idx > after)
            .order_by(log_entries.c.idx)
            .limit(limit)
        )
        found = []
        with self.store.read() as conn:
            for index, data, stored in conn.execute(rows):
                if merkle.leaf_hash(data or b"") != stored:
                    raise tampered(f"entry {index} was changed")
                found.append(LogEntry(index, json.loads(data)))
        return found

    def _head(self, conn: Connection) -> Checkpoint:
        return self._state(conn)[0]

    def _state(self, conn: Connection) -> tuple[Checkpoint, _Nodes]:
        """Return the newest checkpoint and the frontier that leads to its root."""
        last = conn.execute(select(func.max(log_entries.c.idx))).scalar_one()
        size = 0 if last is None else int(last) + 1
        note = _newest_note(conn)
        if note is None:
            if size:
                raise tampered("it has no checkpoint")
            return Checkpoint(self.key.name, 0, merkle.EMPTY_ROOT), {}
        head = self._kept(note)
        if head.size != size:
            raise tampered(f"it has {size} entries and its checkpoint says {head.size}")
        nodes = _frontier(conn, size)
        if _root(nodes, size) != head.root:
            raise tampered("its hashes do not lead to the signed root")
        return head, nodes

    def _checked(self, conn: Connection) -> Checkpoint:
        head = self._head(conn)
        entries = conn.execute(select(func.count()).select_from(log_entries)).scalar_one()
        nodes = conn.execute(select(func.count()).select_from(log_nodes)).scalar_one()
        if not head.size:
            raise tampered("it is empty")
        if entries != head.size or nodes != merkle.node_count(head.size):
            raise tampered(f"it has {entries} rows and {nodes} hashes for {head.size} entries")
        _verify_entries(conn, head.size - 1, head.size)  # the newest entry is under the root
        newest = select(log_entries.c.data).where(log_entries.c.idx == head.size - 1)
        found = schema.standing_digest(conn)
        said = json.loads(conn.execute(newest).scalar_one()).get("state", found)
        if said.keys() == found.keys() and said != found:  # an upgrade changes the tables
            raise tampered("a table beside it is not as the last act left it")
        return head

    def _kept(self, note: str) -> Checkpoint:
        try:
            return self._opened(note)
        except VerificationFailed as error:
            raise tampered(f"its checkpoint is not genuine: {error}") from error

    def _opened(self, note: str) -> Checkpoint:
        checkpoint = Checkpoint.parse(open_note(note, self.key.verifier))
        if checkpoint.origin != self.key.name:
            raise VerificationFailed(f"it is of the log {checkpoint.origin!r}")
        return checkpoint


def _verify_entries(conn: Connection, start: int, end: int) -> None:
    for batch in range(start, end, _BATCH_ENTRIES):
        _verify_batch(conn, batch, min(end, batch + _BATCH_ENTRIES))


def _verify_batch(conn: Connection, start: int, end: int) -> None:
    """Recompute the hashes that entries `start` to `end - 1` complete and compare all of them."""
    rows = conn.execute(_ENTRIES, {"start": start, "end": end}).all()
    if [index for index, _ in rows] != list(range(start, end)):
        raise tampered(f"an entry from {start} to {end - 1} is missing")
    level = 0
    computed = [merkle.leaf_hash(data or b"") for _, data in rows]
    while computed:
        at = {"at_level": level, "start": start >> level, "end": end >> level}
        if conn.execute(_LEVEL, at).scalars().all() != computed:
            raise tampered(f"an entry from {start} to {end - 1}, or its hash, was changed")
        if start >> level & 1:  # the left sister lies before: were it changed, so were its parent
            computed = [*_read(conn, [(level, (start >> level) - 1)]).values(), *computed]
        computed = [*map(merkle.node_hash, computed[::2], computed[1::2])]
        level += 1


def _frontier(conn: Connection, size: int) -> _Nodes:
    """Return the complete subtrees that make up the first `size` entries."""
    return _read(conn, merkle.frontier(size))


def _read(conn: Connection, places: Collection[tuple[int, int]]) -> _Nodes:
    """Return the hashes at these places, by one statement: a server is asked once."""
    if not places:
        return {}
    wanted = ", ".join(f"({level:d}, {index:d})" for level, index in places)
    rows = conn.execute(text(_NODES.format(wanted)).columns(*log_nodes.columns))
    nodes: _Nodes = {(level, index): node for level, index, node in rows}
    for level, index in places:
        if (level, index) not in nodes:
            raise tampered(f"the hash of level {level}, place {index} is missing")
    return nodes


def _root(nodes: _Nodes, size: int) -> bytes:
    return merkle.tree_root(size, lambda *at: nodes[at])


def _newest_note(conn: Connection) -> str | None:
    newest = select(log_checkpoints.c.note).order_by(log_checkpoints.c.size.desc()).limit(1)
    return conn.execute(newest).scalar_one_or_none()


def tampered(what: str) -> TamperedLog:
    """Say what of the log is not as it was written."""
    return TamperedLog(f"the log was changed: {what}", hint=_HINT)
