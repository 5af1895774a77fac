"""Merkle trees: the reference hashes and roots."""

from __future__ import annotations

import pytest
from tests.trees import LEAVES, ROOTS, VECTORS, Tree, defined_root

from llmos.crypto import merkle


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
