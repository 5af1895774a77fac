"""Audit paths of RFC 6962 trees: inclusion and consistency proofs, and their verification."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from llmos.crypto.merkle import EMPTY_ROOT, HASH_BYTES, ReadNode, node_hash, range_root


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
            path.append(range_root(middle, end, read))
            end = middle
        else:
            path.append(range_root(start, middle, read))
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
            path.append(range_root(middle, end, read))
            end = middle
        else:
            path.append(range_root(start, middle, read))
            start = middle
    if start:  # the verifier knows the old root already when the old tree is one complete subtree
        path.append(range_root(start, end, read))
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


def read_at_once(
    path: Callable[[ReadNode], tuple[bytes, ...]],
    read: Callable[[list[tuple[int, int]]], Mapping[tuple[int, int], bytes]],
) -> tuple[bytes, ...]:
    """Return a path whose hashes are read together: a server answers once, not once for each."""
    places: list[tuple[int, int]] = []

    def note(level: int, index: int) -> bytes:
        places.append((level, index))
        return bytes(HASH_BYTES)

    path(note)
    nodes = read(places)
    return path(lambda *at: nodes[at])


def _split(leaves: int) -> int:
    """Return the largest power of two below `leaves`, which is at least 2."""
    return 1 << (leaves - 1).bit_length() - 1


def _trailing_zeros(number: int) -> int:
    """Return how often a positive `number` can be halved."""
    return (number & -number).bit_length() - 1


def _are_hashes(*values: bytes) -> bool:
    return all(len(value) == HASH_BYTES for value in values)
