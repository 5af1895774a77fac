"""The stack of blocks in a language model, and the linear layers in it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from llmos.errors import UnsupportedModel


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """The blocks of one model, from its input to its output."""

    model: nn.Module
    name: str  # of their list in the model, such as `model.layers`
    modules: nn.ModuleList

    @property
    def count(self) -> int:
        """Return how many blocks there are."""
        return len(self.modules)

    def linear_layers(self, positions: range, names: Collection[str]) -> dict[str, nn.Linear]:
        """Find the linear layers of some blocks by the last part of their names; () means all.

        Raises:
            UnsupportedModel: there is none, or none of one of the names.
        """
        layers = {
            f"{self.name}.{position}.{path}": module
            for position in positions
            for path, module in self.modules[position].named_modules()
            if isinstance(module, nn.Linear) and (not names or path.rpartition(".")[2] in names)
        }
        missing = set(names) - {path.rpartition(".")[2] for path in layers}
        if not layers or missing:
            raise UnsupportedModel(
                f"no linear layers {sorted(missing) or ''} in {self.name} of "
                f"{type(self.model).__name__}",
                hint="choose targets from the names of its nn.Linear layers, such as q_proj",
            )
        return layers


def find_blocks(model: nn.Module) -> Blocks:
    """Find a model's stack of blocks: its longest module list.

    Raises:
        UnsupportedModel: it has no module list.
    """
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise UnsupportedModel(f"{type(model).__name__} has no list of blocks")
    return Blocks(model, *max(lists, key=lambda item: len(item[1])))
