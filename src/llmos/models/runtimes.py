"""The models in memory: loaded when first asked for, the least recently used dropped first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Final

import torch

from llmos.errors import HashMismatch, PermissionDenied
from llmos.kernel.vault import ObjectGrant
from llmos.models.folders import digest
from llmos.models.generation import Runtime
from llmos.models.loading import load_base
from llmos.models.lora import merge
from llmos.models.registry import ModelEntry, ModelKind, Registry

DEFAULT_CAPACITY: Final = 4  # models in memory; each adapter is a merged copy of its base


class Runtimes:
    """Opens models for generation; safe for any number of threads."""

    def __init__(
        self, registry: Registry, device: torch.device, *, capacity: int = DEFAULT_CAPACITY
    ) -> None:
        """Keep at most `capacity` models on `device`."""
        self._registry = registry
        self._device = device
        self._capacity = capacity
        self._kept: OrderedDict[tuple[str, str], Runtime] = OrderedDict()
        self._lookup = threading.Lock()
        self._loading = threading.Lock()

    def open(self, entry: ModelEntry, grant: ObjectGrant) -> Runtime:
        """Return the model's runtime; an adapter needs its grant also when it is in memory.

        Raises:
            PermissionDenied: the grant does not cover the adapter.
            HashMismatch: the base model's files are not those that were registered.
            ModelError: the files cannot be loaded.
        """
        if entry.kind is ModelKind.ADAPTER and not grant.permits(entry.location):
            raise PermissionDenied("this request", "open", entry.name, reason="not in its grant")
        if (kept := self._find(entry)) is not None:
            return kept
        with self._loading:
            if (kept := self._find(entry)) is not None:
                return kept
            runtime = self._load(entry, grant)
        with self._lookup:
            self._kept[_key(entry)] = runtime
            while len(self._kept) > self._capacity:
                self._kept.popitem(last=False)
        return runtime

    def _find(self, entry: ModelEntry) -> Runtime | None:
        with self._lookup:
            kept = self._kept.get(_key(entry))
            if kept is not None:
                self._kept.move_to_end(_key(entry))
            return kept

    def _load(self, entry: ModelEntry, grant: ObjectGrant) -> Runtime:
        base = entry if entry.base is None else self._registry.model(entry.base)
        folder = self._registry.folder(base)
        if digest(folder) != base.digest:
            raise HashMismatch(
                f"the files of {base.name} are not those that were registered",
                hint=f"someone changed {folder}; pull the model again under another name",
            )
        loaded = load_base(folder, self._device)
        if entry.kind is ModelKind.ADAPTER:
            merge(loaded.model, self._registry.open_adapter(entry.name, grant))
        return Runtime(loaded)


def _key(entry: ModelEntry) -> tuple[str, str]:
    """Name a runtime so that it is never taken for another model of the same name or content."""
    return entry.name, entry.digest
