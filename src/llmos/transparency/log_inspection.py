"""What differs in a log that does not agree with itself: read without any key.

For a home that refuses to start. Every stored hash is compared with what lies below it, and the
tree over the entries is computed anew, so that it can be told whether an entry or only a hash was
changed. Of SQLite's files a copy is read, outside the home: SQLite would write beside a file that
it reads. On PostgreSQL it is one snapshot, in a transaction that cannot write.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, create_engine
from sqlalchemy.exc import DatabaseError, InvalidRequestError

from llmos.crypto import merkle
from llmos.crypto.notes import Checkpoint, Verifier, open_note
from llmos.databases.postgresql import PostgreSQL
from llmos.errors import HomeMissing, StorageError, VerificationFailed
from llmos.kernel.schema import standing_digest
from llmos.transparency.public_keys import read_public_keys

MOST_DIFFERENCES: Final = 1000  # a log that was replaced differs everywhere
_COPY_ATTEMPTS: Final = 20
_Query = Callable[[str], Iterable[Any]]  # SQL to rows
_FILES: Final = ("kernel.db", "kernel.db-wal")


@dataclass(frozen=True, slots=True)
class Difference:
    """One place of the log and what is wrong there."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found; no differences means that entries, hashes and checkpoints agree."""

    entries: int
    signature_checked: bool  # False where home.pub is missing or cannot be read
    entries_as_signed: bool  # the tree over the entries has the root of the newest checkpoint
    differences: tuple[Difference, ...]  # the first MOST_DIFFERENCES of them


def inspect(home: Path, database: PostgreSQL | None = None) -> Inspection:
    """Compare every entry, hash, count and checkpoint of a home's log; change nothing.

    Args:
        home: the home.
        database: where its kernel.db is; none: in the home.

    Raises:
        HomeMissing: there is no kernel.db.
        StorageError: it cannot be read, or is being written all the time.
    """
    log_key = _log_key(home)
    with _opened_copy(home) if database is None else database.snapshot() as conn:
        found = _Findings([])
        entries, as_signed = 0, False
        try:
            entries, as_signed = _compare(conn.exec_driver_sql, log_key, found)
            if as_signed:  # else the entry of the last act may be what is missing
                _tables_beside(conn, entries, found)
        except DatabaseError as error:
            if database and (fault := database.fault(error)):
                raise fault from error
            found.add("kernel.db", f"it cannot be read as a database: {error.orig}")
        return Inspection(entries, log_key is not None, as_signed, tuple(found.differences))


@dataclass(frozen=True, slots=True)
class _Findings:
    differences: list[Difference]

    def add(self, where: str, what: str) -> None:
        if len(self.differences) < MOST_DIFFERENCES:
            self.differences.append(Difference(where, what))


def _compare(query: _Query, log_key: Verifier | None, found: _Findings) -> tuple[int, bool]:
    """Return how many entries there are, and whether they are those of the newest checkpoint."""
    size = _last_index(query) + 1
    checkpoints = _checkpoints(query, log_key, size, found)
    computed = _entries(query, {head.size for head in checkpoints}, found)
    _inner_hashes(query, size, found)
    for head in checkpoints:
        if head.size in computed and computed[head.size] != head.root:
            found.add(_named(head.size), "its root is not that of the entries")
    as_signed = any((size, computed.get(size)) == (head.size, head.root) for head in checkpoints)
    return size, as_signed


def _last_index(query: _Query) -> int:
    # not max(): on SQLite a text in an index's place would be larger than every number
    indices = (index for (index,) in query("SELECT idx FROM log_entries ORDER BY idx DESC"))
    return next((max(index, -1) for index in indices if isinstance(index, int)), -1)


def _checkpoints(
    query: _Query, log_key: Verifier | None, size: int, found: _Findings
) -> list[Checkpoint]:
    """Read the checkpoints that can be read; the newest must be of the whole log."""
    read = []
    for key, note in query("SELECT size, note FROM log_checkpoints ORDER BY size"):
        try:
            text = _opened(note, log_key)
            head = Checkpoint.parse(text)
        except VerificationFailed as error:
            found.add(_named(key), f"it is not genuine: {error}")
            continue
        if log_key is not None and head.origin != log_key.name:
            found.add(_named(key), f"it is of the log {head.origin!r}")
        if head.size != key:
            found.add(_named(key), f"it was signed for {head.size} entries")
        read.append(head)
    newest = max((head.size for head in read), default=None)
    if newest is None:
        found.add("checkpoint", "there is none that can be read")
    elif newest != size:
        found.add("count", f"the log has {size} entries and its newest checkpoint says {newest}")
    return read


def _opened(note: object, log_key: Verifier | None) -> str:
    if not isinstance(note, str):
        raise VerificationFailed("it is no text")
    if log_key is not None:
        return open_note(note, log_key)
    return note.rpartition("\n\n")[0] + "\n"


def _entries(query: _Query, wanted: set[int], found: _Findings) -> dict[int, bytes]:
    """Compare entries with their hashes; return the roots over them at the wanted sizes.

    After an entry that is missing no root can be computed any more.
    """
    rows = query(
        "SELECT e.idx, e.data, n.hash FROM log_entries e "
        "LEFT JOIN log_nodes n ON n.level = 0 AND n.idx = e.idx ORDER BY e.idx"
    )
    nodes: dict[tuple[int, int], bytes] = {}
    roots: dict[int, bytes] = {0: merkle.EMPTY_ROOT} if 0 in wanted else {}
    expected, whole = 0, True
    for index, data, stored in rows:
        if not isinstance(index, int) or index < 0:
            found.add(f"entry {index}", "no entry has such a number")
            continue
        for missing in range(expected, index):
            found.add(f"entry {missing}", "it is missing")
            whole = False
            if len(found.differences) == MOST_DIFFERENCES:
                break
        expected = index + 1
        leaf = merkle.leaf_hash(_bytes(data))
        if stored is None:
            found.add(f"entry {index}", "the tree holds no hash of it")
        elif stored != leaf:
            found.add(f"entry {index}", "it does not have the hash that the tree holds for it")
        if whole:
            _grow(nodes, index, leaf)
            if index + 1 in wanted:
                roots[index + 1] = merkle.tree_root(index + 1, _read_from(nodes))
    return roots


def _grow(nodes: dict[tuple[int, int], bytes], index: int, leaf: bytes) -> None:
    """Add a leaf and forget what no later root needs: only the frontier is kept."""
    for level, place, node in merkle.completed_nodes(index, leaf, _read_from(nodes)):
        nodes[level, place] = node
    for covered in nodes.keys() - set(merkle.frontier(index + 1)):
        del nodes[covered]


def _inner_hashes(query: _Query, size: int, found: _Findings) -> None:
    """Compare each hash with the two below it, and name those that belong to no entry."""
    rows = query(
        "SELECT n.level, n.idx, n.hash, l.hash, r.hash FROM log_nodes n "
        "LEFT JOIN log_nodes l ON l.level = n.level - 1 AND l.idx = 2 * n.idx "
        "LEFT JOIN log_nodes r ON r.level = n.level - 1 AND r.idx = 2 * n.idx + 1 "
        "ORDER BY n.level, n.idx"
    )
    places: dict[int, int] = {}  # level -> the place that should come next
    for level, index, node, left, right in rows:
        where = f"hash of level {level}, place {index}"
        if not _is_place(level, index, size):
            found.add(where, "it belongs to no entry")
            continue
        _missing_places(level, places.get(level, 0), index, found)
        places[level] = index + 1
        if level and None not in {left, right} and _above(left, right) != node:
            found.add(where, "it is not the hash of the two below it")
    for level in range(size.bit_length()):
        _missing_places(level, places.get(level, 0), size >> level, found)


def _tables_beside(conn: Connection, size: int, found: _Findings) -> None:
    """Compare the tables that every act's entry has a digest of with the newest entry."""
    newest = conn.exec_driver_sql(f"SELECT data FROM log_entries WHERE idx = {size - 1}").scalar()  # noqa: S608
    try:
        said = json.loads(_bytes(newest))["state"]
        now = standing_digest(conn)
    except (LookupError, TypeError, ValueError):
        return  # an older version's entry, without a digest
    except InvalidRequestError:
        found.add("schema", "its revision is not one row")
        return
    if said != now and {*said} == {*now}:  # an upgrade changes the tables
        found.add("tables", "rows of people, keys, data, models or pools were changed by no act")


def _above(left: object, right: object) -> bytes:
    return merkle.node_hash(_bytes(left), _bytes(right))


def _is_place(level: object, index: object, size: int) -> bool:
    match level, index:
        case int(level), int(index):
            return 0 <= level < size.bit_length() and 0 <= index < size >> level
    return False


def _missing_places(level: int, start: int, end: int, found: _Findings) -> None:
    for place in range(start, min(end, start + MOST_DIFFERENCES)):
        if level:  # of the lowest level `_entries` has told
            found.add(f"hash of level {level}, place {place}", "it is missing")


def _read_from(nodes: dict[tuple[int, int], bytes]) -> Callable[[int, int], bytes]:
    return lambda level, place: nodes[level, place]


def _bytes(cell: object) -> bytes:
    """Return a cell's bytes; a text or number in its place gives bytes that hash to no leaf."""
    return cell if isinstance(cell, bytes) else repr(cell).encode()


def _named(size: object) -> str:
    return f"checkpoint of {size} entries"


def _log_key(home: Path) -> Verifier | None:
    try:
        return read_public_keys((home / "home.pub").read_text())[1]
    except (OSError, UnicodeDecodeError, VerificationFailed):
        return None


@contextmanager
def _opened_copy(home: Path) -> Iterator[Connection]:
    with _copied(home) as copy:
        engine = create_engine("sqlite://", creator=lambda: sqlite3.connect(copy))
        with engine.connect() as connection:
            yield connection
        engine.dispose()


@contextmanager
def _copied(home: Path) -> Iterator[Path]:
    """Copy the database with its write-ahead log, again while someone is writing to it."""
    if not (home / "kernel.db").is_file():
        raise HomeMissing(f"there is no kernel.db in {home}", hint="name the home with --home")
    try:
        with tempfile.TemporaryDirectory(prefix="llmos-inspect-") as folder:
            for _ in range(_COPY_ATTEMPTS):
                before = _state(home)
                for name in _FILES:
                    (Path(folder) / name).unlink(missing_ok=True)
                for name in before:
                    shutil.copyfile(home / name, Path(folder) / name)
                if before == _state(home):
                    break
            else:
                raise StorageError(
                    f"{home} is being written all the time", hint="stop its server and try again"
                )
            yield Path(folder) / "kernel.db"
    except OSError as error:
        raise StorageError.of(error, str(home / "kernel.db")) from error


def _state(home: Path) -> dict[str, tuple[int, int]]:
    present = [name for name in _FILES if (home / name).exists()]
    stats = {name: (home / name).stat() for name in present}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
