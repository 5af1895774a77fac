"""Audit paths: the reference proofs, and all proofs of all small trees."""

from __future__ import annotations

from itertools import combinations_with_replacement
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.trees import LARGEST, LEAVES, ROOTS, TREE, VECTORS, Tree, defined_root

from llmos.crypto.merkle import leaf_hash
from llmos.transparency import audit_paths


@pytest.mark.parametrize("vector", VECTORS["inclusion"])
def test_reference_inclusion_proofs(vector: dict[str, Any]) -> None:
    index, size = vector["index"], vector["size"]
    proof = audit_paths.inclusion_proof(index, size, Tree(LEAVES).read)
    assert [node.hex() for node in proof] == vector["path"]
    assert audit_paths.verify_inclusion(index, size, leaf_hash(LEAVES[index]), proof, ROOTS[size])


@pytest.mark.parametrize("vector", VECTORS["consistency"])
def test_reference_consistency_proofs(vector: dict[str, Any]) -> None:
    old, size = vector["old"], vector["size"]
    proof = audit_paths.consistency_proof(old, size, Tree(LEAVES).read)
    assert [node.hex() for node in proof] == vector["path"]
    assert audit_paths.verify_consistency(old, size, ROOTS[old], ROOTS[size], proof)


def test_reference_proof_of_a_large_public_log() -> None:
    large = VECTORS["large"]
    path = [bytes.fromhex(node) for node in large["path"]]
    leaf, root = bytes.fromhex(large["leaf"]), bytes.fromhex(large["root"])
    assert audit_paths.verify_inclusion(large["index"], large["size"], leaf, path, root)
    assert not audit_paths.verify_inclusion(large["index"] + 1, large["size"], leaf, path, root)


@pytest.mark.parametrize("size", range(1, LARGEST + 1))
def test_all_inclusion_proofs(size: int) -> None:
    root = TREE.root(size)
    assert root == defined_root([b"entry %d" % n for n in range(size)])
    for index in range(size):
        leaf = TREE.read(0, index)
        proof = audit_paths.inclusion_proof(index, size, TREE.read)
        assert audit_paths.verify_inclusion(index, size, leaf, proof, root)
        assert not audit_paths.verify_inclusion((index + 1) % size + size, size, leaf, proof, root)
        assert not audit_paths.verify_inclusion(index, size, leaf_hash(b""), proof, root)
        assert not audit_paths.verify_inclusion(index, size, leaf, [*proof, root], root)
        if size > 1:
            assert not audit_paths.verify_inclusion((index + 1) % size, size, leaf, proof, root)
            assert not audit_paths.verify_inclusion(index, size, leaf, proof[:-1], root)


def test_all_consistency_proofs() -> None:
    roots = [TREE.root(size) for size in range(LARGEST + 1)]
    for old, size in combinations_with_replacement(range(LARGEST + 1), 2):
        proof = audit_paths.consistency_proof(old, size, TREE.read)
        verify = audit_paths.verify_consistency
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
    parts = [
        TREE.read(0, index),
        TREE.root(size),
        *audit_paths.inclusion_proof(index, size, TREE.read),
    ]
    which, bit = data.draw(st.integers(0, len(parts) - 1)), data.draw(st.integers(0, 255))
    changed = bytearray(parts[which])
    changed[bit // 8] ^= 1 << bit % 8
    parts[which] = bytes(changed)
    leaf, root, *proof = parts
    assert not audit_paths.verify_inclusion(index, size, leaf, proof, root)


def test_sizes_and_hashes_that_cannot_be() -> None:
    root, leaf = TREE.root(2), TREE.read(0, 0)
    sibling = TREE.read(0, 1)
    assert audit_paths.verify_inclusion(0, 2, leaf, [sibling], root)
    assert not audit_paths.verify_inclusion(-1, 2, leaf, [sibling], root)
    assert not audit_paths.verify_inclusion(2, 2, leaf, [sibling], root)
    assert not audit_paths.verify_inclusion(0, 2, leaf[:-1], [leaf[-1:] + sibling], root)
    assert not audit_paths.verify_consistency(2, 1, root, leaf, [])
    assert not audit_paths.verify_consistency(-1, 2, root, root, [])
    assert not audit_paths.verify_consistency(1, 2, leaf, root, [])
    assert not audit_paths.verify_consistency(1, 2, leaf, root, [sibling + b"\x00"])
    for index in (-1, 2):
        with pytest.raises(ValueError, match="no leaf"):
            audit_paths.inclusion_proof(index, 2, TREE.read)
    for old in (-1, 3):
        with pytest.raises(ValueError, match="never had"):
            audit_paths.consistency_proof(old, 2, TREE.read)
