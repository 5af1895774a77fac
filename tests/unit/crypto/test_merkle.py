"""Merkle trees: the reference roots and proofs, and all proofs of all small trees."""

from __future__ import annotations

import json
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.crypto import merkle

VECTORS = json.loads(
    (Path(__file__).parents[2] / "vectors" / "rfc6962.json").read_text(encoding="utf-8")
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


def test_reference_hashes() -> None:
    leaf, node = VECTORS["leaf"], VECTORS["node"]
    assert merkle.leaf_hash(bytes.fromhex(leaf["entry"])).hex() == leaf["hash"]
    children = bytes.fromhex(node["left"]), bytes.fromhex(node["right"])
    assert merkle.node_hash(*children).hex() == node["hash"]


@pytest.mark.parametrize("size", range(len(ROOTS)))
def test_reference_roots(size: int) -> None:
    tree = Tree(LEAVES[:size])
    assert tree.root(size) == ROOTS[size] == defined_root(LEAVES[:size])
    assert len(tree.nodes) == merkle.node_count(size)
    hashes = [tree.read(level, index) for level, index in merkle.frontier(size)]
    assert merkle.root_from_frontier(hashes) == ROOTS[size]


@pytest.mark.parametrize("vector", VECTORS["inclusion"])
def test_reference_inclusion_proofs(vector: dict[str, Any]) -> None:
    index, size = vector["index"], vector["size"]
    proof = merkle.inclusion_proof(index, size, Tree(LEAVES).read)
    assert [node.hex() for node in proof] == vector["path"]
    assert merkle.verify_inclusion(index, size, merkle.leaf_hash(LEAVES[index]), proof, ROOTS[size])


@pytest.mark.parametrize("vector", VECTORS["consistency"])
def test_reference_consistency_proofs(vector: dict[str, Any]) -> None:
    old, size = vector["old"], vector["size"]
    proof = merkle.consistency_proof(old, size, Tree(LEAVES).read)
    assert [node.hex() for node in proof] == vector["path"]
    assert merkle.verify_consistency(old, size, ROOTS[old], ROOTS[size], proof)


def test_reference_proof_of_a_large_public_log() -> None:
    large = VECTORS["large"]
    path = [bytes.fromhex(node) for node in large["path"]]
    leaf, root = bytes.fromhex(large["leaf"]), bytes.fromhex(large["root"])
    assert merkle.verify_inclusion(large["index"], large["size"], leaf, path, root)
    assert not merkle.verify_inclusion(large["index"] + 1, large["size"], leaf, path, root)


@pytest.mark.parametrize("size", range(1, LARGEST + 1))
def test_all_inclusion_proofs(size: int) -> None:
    root = TREE.root(size)
    assert root == defined_root([b"entry %d" % n for n in range(size)])
    for index in range(size):
        leaf = TREE.read(0, index)
        proof = merkle.inclusion_proof(index, size, TREE.read)
        assert merkle.verify_inclusion(index, size, leaf, proof, root)
        assert not merkle.verify_inclusion((index + 1) % size + size, size, leaf, proof, root)
        assert not merkle.verify_inclusion(index, size, merkle.leaf_hash(b""), proof, root)
        assert not merkle.verify_inclusion(index, size, leaf, [*proof, root], root)
        if size > 1:
            assert not merkle.verify_inclusion((index + 1) % size, size, leaf, proof, root)
            assert not merkle.verify_inclusion(index, size, leaf, proof[:-1], root)


def test_all_consistency_proofs() -> None:
    roots = [TREE.root(size) for size in range(LARGEST + 1)]
    for old, size in combinations_with_replacement(range(LARGEST + 1), 2):
        proof = merkle.consistency_proof(old, size, TREE.read)
        verify = merkle.verify_consistency
        assert verify(old, size, roots[old], roots[size], proof)
        assert not verify(old, size, roots[size - old], roots[size], proof) or 2 * old == size
        assert not verify(old, size, bytes(32), roots[size], proof)
        assert not verify(old, size, roots[old], roots[size], [*proof, bytes(32)])
        if old > 0:
            assert not verify(old, size, roots[old], bytes(32), proof)
        if proof:
            assert not verify(old, size, roots[old], roots[size], proof[:-1])
            assert not verify(old - 1, size, roots[old], roots[size], proof)


@given(st.integers(1, LARGEST), st.data())
def test_a_flipped_bit_in_a_proof_is_refused(size: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    parts = [TREE.read(0, index), TREE.root(size), *merkle.inclusion_proof(index, size, TREE.read)]
    which, bit = data.draw(st.integers(0, len(parts) - 1)), data.draw(st.integers(0, 255))
    changed = bytearray(parts[which])
    changed[bit // 8] ^= 1 << bit % 8
    parts[which] = bytes(changed)
    leaf, root, *proof = parts
    assert not merkle.verify_inclusion(index, size, leaf, proof, root)


def test_sizes_and_hashes_that_cannot_be() -> None:
    root, leaf = TREE.root(2), TREE.read(0, 0)
    sibling = TREE.read(0, 1)
    assert merkle.verify_inclusion(0, 2, leaf, [sibling], root)
    assert not merkle.verify_inclusion(-1, 2, leaf, [sibling], root)
    assert not merkle.verify_inclusion(2, 2, leaf, [sibling], root)
    assert not merkle.verify_inclusion(0, 2, leaf[:-1], [leaf[-1:] + sibling], root)
    assert not merkle.verify_consistency(2, 1, root, leaf, [])
    assert not merkle.verify_consistency(-1, 2, root, root, [])
    assert not merkle.verify_consistency(1, 2, leaf, root, [])
    assert not merkle.verify_consistency(1, 2, leaf, root, [sibling + b"\x00"])
    for index in (-1, 2):
        with pytest.raises(ValueError, match="no leaf"):
            merkle.inclusion_proof(index, 2, TREE.read)
    for old in (-1, 3):
        with pytest.raises(ValueError, match="never had"):
            merkle.consistency_proof(old, 2, TREE.read)
