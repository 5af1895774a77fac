"""The stack of blocks, and which of its linear layers are chosen."""

from __future__ import annotations

import pytest
from torch import nn

from llmos.errors import UnsupportedModel
from llmos.models.blocks import find_blocks


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.ModuleDict({"inner": nn.Linear(2, 3), "outer": nn.Linear(3, 2)})
        self.norm = nn.LayerNorm(2)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(2, 2)])
        self.body = nn.ModuleDict({"layers": nn.ModuleList([Block() for _ in range(3)])})


def test_the_longest_list_is_the_stack() -> None:
    model = Stack()
    blocks = find_blocks(model)
    assert (blocks.name, blocks.count) == ("body.layers", 3)
    assert blocks.modules is model.get_submodule("body.layers")


def test_linear_layers_are_found_by_position_and_by_the_last_part_of_their_name() -> None:
    blocks = find_blocks(Stack())
    assert len(blocks.linear_layers(range(3), ())) == 6
    chosen = blocks.linear_layers(range(1, 3), ("outer",))
    assert list(chosen) == ["body.layers.1.mixer.outer", "body.layers.2.mixer.outer"]
    assert chosen["body.layers.1.mixer.outer"].out_features == 2


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"\['norm'\] in body.layers of Stack"):
        find_blocks(Stack()).linear_layers(range(3), ("inner", "norm"))
    with pytest.raises(UnsupportedModel, match="no list of blocks"):
        find_blocks(nn.Linear(2, 2))
