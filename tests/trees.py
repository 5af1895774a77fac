"""Stored RFC 6962 trees and the reference vectors, for the tests of hashes and of audit paths."""

from __future__ import annotations

import json
from pathlib import Path

from llmos.crypto import merkle

VECTORS = json.loads(
    (Path(__file__).parent / "vectors" / "rfc6962.json").read_text(encoding="utf-8")
)
LEAVES = [bytes.fromhex(leaf) for leaf in VECTORS["leaves"]]
ROOTS = [bytes.fromhex(root) for root in VECTORS["roots"]]
LARGEST = 64


class Tree:
    """A stored tree, as the log keeps it in its table."""

    def __init__(self, entries: list[bytes]) -> None:
        self.nodes: dict[tuple[int, int], bytes] = {}
        self.size = 0
        for entry in entries:
            leaf = merkle.leaf_hash(entry)
            for level, index, node in merkle.completed_nodes(self.size, leaf, self.read):
                assert (level, index) not in self.nodes
                self.nodes[level, index] = node
            self.size += 1

    def read(self, level: int, index: int) -> bytes:
        return self.nodes[level, index]

    def root(self, size: int) -> bytes:
        return merkle.tree_root(size, self.read)


def defined_root(entries: list[bytes]) -> bytes:
    """The recursive definition of RFC 6962 section 2.1, word for word."""
    if not entries:
        return merkle.EMPTY_ROOT
    if len(entries) == 1:
        return merkle.leaf_hash(entries[0])
    split = 1
    while split * 2 < len(entries):
        split *= 2
    return merkle.node_hash(defined_root(entries[:split]), defined_root(entries[split:]))


TREE = Tree([b"entry %d" % n for n in range(LARGEST)])
