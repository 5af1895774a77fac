"""RFC 6962 Merkle trees: hashes and roots; `transparency.audit_paths` has the proofs.

A tree is never held in memory. Whoever stores it keeps the hash of every complete subtree under
`(level, index)`: that node covers the leaves `index * 2**level` to `(index + 1) * 2**level - 1`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Final

HASH_BYTES: Final = 32
EMPTY_ROOT: Final = hashlib.sha256(b"").digest()

ReadNode = Callable[[int, int], bytes]  # (level, index) -> stored hash of that complete subtree


def leaf_hash(entry: bytes) -> bytes:
    """Return the hash of one entry (RFC 6962 section 2.1)."""
    return hashlib.sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the hash of an inner node (RFC 6962 section 2.1)."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def frontier(size: int) -> tuple[tuple[int, int], ...]:
    """Return the complete subtrees that make up a tree of `size` leaves, the largest first.

    >>> frontier(6)
    ((2, 0), (1, 2))
    """
    levels = reversed(range(size.bit_length()))
    return tuple((level, (size >> level) - 1) for level in levels if size >> level & 1)


def root_from_frontier(hashes: Sequence[bytes]) -> bytes:
    """Return the root over the frontier's hashes, given in the order of `frontier`."""
    if not hashes:
        return EMPTY_ROOT
    root = hashes[-1]
    for left in reversed(hashes[:-1]):
        root = node_hash(left, root)
    return root


def completed_nodes(size: int, leaf: bytes, read: ReadNode) -> list[tuple[int, int, bytes]]:
    """Return the subtrees that become complete when leaf hash `leaf` joins a tree of `size` leaves.

    Returns:
        `(level, index, hash)` from the leaf upwards; the caller stores all of them.
    """
    nodes = [(0, size, leaf)]
    level, index, node = 0, size, leaf
    while index & 1:
        node = node_hash(read(level, index - 1), node)
        level, index = level + 1, index >> 1
        nodes.append((level, index, node))
    return nodes


def node_count(size: int) -> int:
    """Return how many complete subtrees a tree of `size` leaves has.

    >>> node_count(6)
    10
    """
    return 2 * size - size.bit_count()


def tree_root(size: int, read: ReadNode) -> bytes:
    """Return the root of the first `size` leaves."""
    return range_root(0, size, read)


def range_root(start: int, end: int, read: ReadNode) -> bytes:
    """Return the root over leaves `start` to `end - 1` of a range that RFC 6962 splits off."""
    hashes = []
    while start < end:
        level = (end - start).bit_length() - 1
        hashes.append(read(level, start >> level))
        start += 1 << level
    return root_from_frontier(hashes)
