"""RFC 6962 Merkle trees: hashes, roots, inclusion and consistency proofs, and their verification.

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
    return _range_root(0, size, read)


def inclusion_proof(index: int, size: int, read: ReadNode) -> tuple[bytes, ...]:
    """Return the audit path of leaf `index` in a tree of `size` leaves (RFC 6962 section 2.1.1).

    Raises:
        ValueError: the tree has no such leaf.
    """
    if not 0 <= index < size:
        raise ValueError(f"a tree of {size} leaves has no leaf {index}")
    path: list[bytes] = []
    start, end = 0, size
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            path.append(_range_root(middle, end, read))
            end = middle
        else:
            path.append(_range_root(start, middle, read))
            start = middle
    return tuple(reversed(path))


def consistency_proof(old_size: int, size: int, read: ReadNode) -> tuple[bytes, ...]:
    """Return the proof that the first `old_size` leaves did not change (RFC 6962 section 2.1.2).

    Raises:
        ValueError: the old tree is larger than the new one.
    """
    if not 0 <= old_size <= size:
        raise ValueError(f"a tree of {size} leaves never had {old_size}")
    if old_size in {0, size}:
        return ()
    path: list[bytes] = []
    start, end = 0, size
    while end != old_size:
        middle = start + _split(end - start)
        if old_size <= middle:
            path.append(_range_root(middle, end, read))
            end = middle
        else:
            path.append(_range_root(start, middle, read))
            start = middle
    if start:  # the verifier knows the old root already when the old tree is one complete subtree
        path.append(_range_root(start, end, read))
    return tuple(reversed(path))


def verify_inclusion(
    index: int, size: int, leaf: bytes, proof: Sequence[bytes], root: bytes
) -> bool:
    """Tell whether leaf hash `leaf` stands at `index` of the tree (RFC 9162 section 2.1.3.2)."""
    if not 0 <= index < size or not _are_hashes(leaf, root, *proof):
        return False
    node, last, current = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            return False
        if node & 1 or node == last:
            current = node_hash(sibling, current)
            shift = _trailing_zeros(node)
            node, last = node >> shift, last >> shift
        else:
            current = node_hash(current, sibling)
        node, last = node >> 1, last >> 1
    return last == 0 and current == root


def verify_consistency(
    old_size: int, size: int, old_root: bytes, root: bytes, proof: Sequence[bytes]
) -> bool:
    """Tell whether the old tree is a beginning of the new one (RFC 9162 section 2.1.4.2)."""
    if not 0 <= old_size <= size or not _are_hashes(old_root, root, *proof):
        return False
    if old_size == size:
        return not proof and old_root == root
    if old_size == 0:
        return not proof and old_root == EMPTY_ROOT
    if not proof:
        return False
    if old_size & (old_size - 1) == 0:
        proof = [old_root, *proof]
    shift = _trailing_zeros(old_size)
    node, last = (old_size - 1) >> shift, (size - 1) >> shift
    old_current = current = proof[0]
    for sibling in proof[1:]:
        if last == 0:
            return False
        if node & 1 or node == last:
            old_current = node_hash(sibling, old_current)
            current = node_hash(sibling, current)
            shift = _trailing_zeros(node)
            node, last = node >> shift, last >> shift
        else:
            current = node_hash(current, sibling)
        node, last = node >> 1, last >> 1
    return last == 0 and old_current == old_root and current == root


def _split(leaves: int) -> int:
    """Return the largest power of two below `leaves`, which is at least 2."""
    return 1 << (leaves - 1).bit_length() - 1


def _range_root(start: int, end: int, read: ReadNode) -> bytes:
    """Return the root over leaves `start` to `end - 1` of a range that RFC 6962 splits off."""
    hashes = []
    while start < end:
        level = (end - start).bit_length() - 1
        hashes.append(read(level, start >> level))
        start += 1 << level
    return root_from_frontier(hashes)


def _trailing_zeros(number: int) -> int:
    """Return how often a positive `number` can be halved."""
    return (number & -number).bit_length() - 1


def _are_hashes(*values: bytes) -> bool:
    return all(len(value) == HASH_BYTES for value in values)
