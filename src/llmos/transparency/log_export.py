"""The log as files for others: verified entries, C2SP tiles for static hosting, OCSF events.

Every export reads all entries up to one signed checkpoint and computes the tree over them anew.
The files are good only when the roots agree; the caller keeps nothing of a failed export.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Final

import rfc8785

from llmos.crypto import merkle
from llmos.crypto.notes import Checkpoint
from llmos.errors import ConfigError, TamperedLog
from llmos.kernel.auditlog import AuditLog, LogEntry
from llmos.transparency.ocsf import event

TILE_WIDTH: Final = 256  # hashes or entries; https://c2sp.org/tlog-tiles
_MOST_ENTRY_BYTES: Final = 0xFFFF  # what an entry bundle's length prefix can say
_ENTRIES_A_READ: Final = 512


class ExportFormat(StrEnum):
    """In which form the log is written."""

    OCSF = "ocsf"
    JSONL = "jsonl"
    TILES = "tiles"


def write(log: AuditLog, form: ExportFormat, folder: Path) -> Checkpoint:
    """Write the log up to its newest checkpoint into an empty folder and return that checkpoint.

    Raises:
        TamperedLog: the entries do not lead to the signed root.
        ConfigError: an entry is too long for a tile's entry bundle.
        OSError: the folder cannot be written.
    """
    note = log.checkpoint()
    head = Checkpoint.parse(note.rpartition("\n\n")[0] + "\n")
    _WRITERS[form](_verified(log, head), head, folder)
    (folder / "checkpoint").write_text(note, newline="")
    return head


def _verified(log: AuditLog, head: Checkpoint) -> Iterator[tuple[LogEntry, bytes]]:
    """Yield each entry with its bytes; after the last one compare the root that they lead to."""
    nodes: dict[tuple[int, int], bytes] = {}

    def read(level: int, place: int) -> bytes:
        return nodes[level, place]

    index = 0
    while index < head.size:
        entries = log.entries(index - 1, min(_ENTRIES_A_READ, head.size - index))
        for entry in entries:
            if entry.index != index:
                raise TamperedLog(f"the log was changed: entry {index} is missing")
            data = rfc8785.dumps(entry.fields)
            for level, place, node in merkle.completed_nodes(index, merkle.leaf_hash(data), read):
                nodes[level, place] = node
            for covered in nodes.keys() - set(merkle.frontier(index + 1)):
                del nodes[covered]
            yield entry, data
            index += 1
        if not entries:
            raise TamperedLog(f"the log was changed: entry {index} is missing")
    if merkle.tree_root(head.size, read) != head.root:
        raise TamperedLog("the log was changed: its entries do not lead to the signed root")


def _write_jsonl(
    entries: Iterable[tuple[LogEntry, bytes]], _head: Checkpoint, folder: Path
) -> None:
    """Write a line for each entry: exactly the bytes of its leaf, and a newline."""
    with (folder / "entries.jsonl").open("xb") as file:
        for _, data in entries:
            file.write(data + b"\n")


def _write_ocsf(entries: Iterable[tuple[LogEntry, bytes]], head: Checkpoint, folder: Path) -> None:
    with (folder / "events.jsonl").open("xb") as file:
        for entry, data in entries:
            file.write(rfc8785.dumps(event(entry, data, head.origin)) + b"\n")


def _write_tiles(
    entries: Iterable[tuple[LogEntry, bytes]], _head: Checkpoint, folder: Path
) -> None:
    """Write full and partial tiles of hashes and the entry bundles (C2SP tlog-tiles)."""
    levels: list[_TileRow] = []
    bundles = _TileRow(folder / "tile" / "entries")
    for entry, data in entries:
        if len(data) > _MOST_ENTRY_BYTES:
            raise ConfigError(
                f"entry {entry.index} has {len(data)} bytes; a tile's entries have 65,535 at most",
                hint="export the log as jsonl",
            )
        bundles.add(struct.pack(">H", len(data)) + data)
        _add_hash(levels, 0, merkle.leaf_hash(data), folder)
    for row in (bundles, *levels):
        row.write_partial()


class _TileRow:
    """The tiles of one level; the one that is being filled is kept in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tile = 0
        self._items: list[bytes] = []

    def add(self, item: bytes) -> list[bytes] | None:
        """Add a hash or an entry; return the items of the tile that it filled and wrote."""
        self._items.append(item)
        if len(self._items) < TILE_WIDTH:
            return None
        self._write(tile_path(self._tile))
        filled, self._items = self._items, []
        self._tile += 1
        return filled

    def write_partial(self) -> None:
        """Write what is left as a partial tile; an empty one is not served."""
        if self._items:
            self._write(f"{tile_path(self._tile)}.p/{len(self._items)}")

    def _write(self, name: str) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(self._items))


def _add_hash(levels: list[_TileRow], level: int, node: bytes, folder: Path) -> None:
    if level == len(levels):
        levels.append(_TileRow(folder / "tile" / str(level)))
    filled = levels[level].add(node)
    if filled is not None:
        _add_hash(levels, level + 1, _root(filled), folder)


def _root(row: list[bytes]) -> bytes:
    """Return the hash of the complete subtree over the hashes of a full tile."""
    while len(row) > 1:
        row = [merkle.node_hash(row[i], row[i + 1]) for i in range(0, len(row), 2)]
    return row[0]


def tile_path(index: int) -> str:
    """Return the path of a tile: three digits an element, all but the last after an `x`.

    >>> tile_path(1234067)
    'x001/x234/067'
    """
    digits = str(index)
    digits = digits.zfill(-(-len(digits) // 3) * 3)
    *first, last = [digits[i : i + 3] for i in range(0, len(digits), 3)]
    return "".join(f"x{part}/" for part in first) + last


_WRITERS: Final[
    dict[ExportFormat, Callable[[Iterable[tuple[LogEntry, bytes]], Checkpoint, Path], None]]
] = {
    ExportFormat.OCSF: _write_ocsf,
    ExportFormat.JSONL: _write_jsonl,
    ExportFormat.TILES: _write_tiles,
}
