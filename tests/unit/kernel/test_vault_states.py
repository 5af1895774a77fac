"""The vault against a plain dict: puts, reads, deletions, rotations and reopenings in any order."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)
from tests.databases import open_store

from llmos.errors import StorageError
from llmos.kernel.schema import KEYS
from llmos.kernel.store import Store
from llmos.kernel.vault import Vault

pytestmark = pytest.mark.databases

ROOT_KEY = bytes(range(32))


class Everything:
    """A grant for all objects."""

    def permits(self, object_id: str) -> bool:
        return True


class VaultAndDict(RuleBasedStateMachine):
    """Whatever is done, the vault holds what a dict would."""

    objects = Bundle("objects")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.home = Path(self.folder.name)
        self.store: Store | None = None
        self.model: dict[str, tuple[str, bytes]] = {}

    @initialize()
    def make(self) -> None:
        self.open()

    @rule()
    def open(self) -> None:
        if self.store is not None:
            self.store.close()
        self.store = open_store(self.home / "keys.db", KEYS)
        self.vault = Vault(self.home, self.store, ROOT_KEY)

    @rule(
        target=objects,
        kind=st.sampled_from(["records", "adapter"]),
        plain=st.one_of(st.binary(max_size=40), st.just(bytes(16384)), st.just(bytes(40_000))),
    )
    def put(self, kind: str, plain: bytes) -> str:
        object_id = self.vault.put(kind, plain)
        assert object_id not in self.model
        self.model[object_id] = (kind, plain)
        return object_id

    @rule(object_id=objects)
    def read(self, object_id: str) -> None:
        kind, plain = self.model[object_id]
        assert self.vault.read(object_id, kind, Everything()) == plain

    @rule(object_id=consumes(objects))
    def delete(self, object_id: str) -> None:
        kind, _ = self.model.pop(object_id)
        self.vault.delete(object_id)
        with pytest.raises(StorageError, match="there is no object"):
            self.vault.read(object_id, kind, Everything())

    @rule()
    def begin_rotation(self) -> None:
        self.vault.keyring.begin()

    @rule()
    def rewrap(self) -> None:
        if self.model:
            self.vault.keyring.rewrap()

    @rule()
    def retire(self) -> None:
        if self.model:
            self.vault.keyring.retire()

    @rule()
    def rotate(self) -> None:
        version = self.vault.keyring.begin()
        while self.vault.keyring.rewrap():
            pass
        self.vault.keyring.retire()
        with self.vault.keyring.store.read() as conn:
            left = conn.exec_driver_sql("SELECT DISTINCT key_version FROM object_keys").all()
        assert [row[0] for row in left] == ([version] if self.model else [])

    @invariant()
    def every_object_has_one_file(self) -> None:
        files = {path.name for path in self.home.glob("objects/??/*")}
        assert files == set(self.model)

    def teardown(self) -> None:
        for object_id in self.model:
            self.read(object_id)
        if self.store is not None:
            self.store.close()
        self.folder.cleanup()


TestVaultAndDict = VaultAndDict.TestCase
TestVaultAndDict.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
