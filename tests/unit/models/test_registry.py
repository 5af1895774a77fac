from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from tests.databases import open_store

from llmos.errors import HashMismatch, ModelError, ModelExists, PermissionDenied, UnknownModel
from llmos.kernel import schema
from llmos.kernel.store import Store
from llmos.kernel.vault import Vault
from llmos.models.registry import ModelKind, Registry
from llmos.models.tables import models

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}


@dataclass(frozen=True)
class Objects:
    """A grant for these objects, as the monitor would hand it out."""

    ids: frozenset[str] = frozenset()

    def permits(self, object_id: str) -> bool:
        return object_id in self.ids


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = open_store(tmp_path / "kernel.db", schema.KERNEL)
    yield store
    store.close()


@pytest.fixture
def registry(store: Store, tmp_path: Path) -> Iterator[Registry]:
    keys = open_store(tmp_path / "keys.db", schema.KEYS)
    yield Registry(store, Vault(tmp_path, keys, bytes(32)), tmp_path)
    keys.close()


def publish(store: Store, registry: Registry, name: str = "notes-private", **card: Any) -> str:
    object_id, digest = registry.store_adapter(FILES)
    with store.transaction() as conn:
        registry.publish_adapter(
            conn, name=name, base="tiny", object_id=object_id, digest=digest, card=card
        )
    return object_id


@pytest.fixture
def base(store: Store, registry: Registry) -> None:
    with store.transaction() as conn:
        registry.register_base(conn, "tiny", "models/tiny", "ab" * 32, {"licence": "MIT"})


@pytest.mark.usefixtures("base")
def test_a_base_model_is_found_with_its_folder(registry: Registry, tmp_path: Path) -> None:
    entry = registry.model("tiny")
    assert (entry.kind, entry.base, entry.digest) == (ModelKind.BASE, None, "ab" * 32)
    assert entry.card == {"licence": "MIT"}
    assert registry.folder(entry) == tmp_path / "models/tiny"
    assert json.loads(json.dumps(entry.to_dict()))["kind"] == "base"
    assert [model.name for model in registry.models()] == ["tiny"]


@pytest.mark.usefixtures("base")
def test_an_adapter_comes_back_as_it_was_stored(store: Store, registry: Registry) -> None:
    object_id = publish(store, registry, epsilon=3.0)
    assert registry.open_adapter("notes-private", Objects(frozenset({object_id}))) == FILES
    assert registry.model("notes-private").base == "tiny"


@pytest.mark.usefixtures("base")
def test_an_adapter_needs_a_grant(store: Store, registry: Registry) -> None:
    publish(store, registry)
    with pytest.raises(PermissionDenied):
        registry.open_adapter("notes-private", Objects())


@pytest.mark.usefixtures("base")
def test_an_adapter_whose_row_names_another_object_is_refused(
    store: Store, registry: Registry
) -> None:
    publish(store, registry)
    other, _ = registry.store_adapter({"adapter_config.json": b"other"})
    with store.transaction() as conn:
        rows = models
        conn.execute(update(rows).where(rows.c.name == "notes-private").values(location=other))
    with pytest.raises(HashMismatch, match="notes-private"):
        registry.open_adapter("notes-private", Objects(frozenset({other})))


@pytest.mark.usefixtures("base")
def test_a_base_model_has_no_adapter(registry: Registry) -> None:
    with pytest.raises(ModelError, match="base model"):
        registry.open_adapter("tiny", Objects())


@pytest.mark.usefixtures("base")
def test_an_unknown_name_is_answered_with_near_ones(registry: Registry) -> None:
    with pytest.raises(UnknownModel) as caught:
        registry.model("tiney")
    assert caught.value.hint == "did you mean tiny?"
    with pytest.raises(UnknownModel) as caught:
        registry.model("gpt")
    assert "llmos model ls" in caught.value.hint


@pytest.mark.usefixtures("base")
def test_a_name_is_given_once(store: Store, registry: Registry) -> None:
    publish(store, registry)
    with pytest.raises(ModelExists):
        publish(store, registry)
    with pytest.raises(ModelExists), store.transaction() as conn:
        registry.register_base(conn, "notes-private", "models/x", "", {})
    assert len(registry.models()) == 2


@pytest.mark.usefixtures("base")
def test_an_adapter_stands_on_a_base_model(store: Store, registry: Registry) -> None:
    publish(store, registry)
    for base in ("absent", "notes-private"):
        with pytest.raises(UnknownModel, match=base), store.transaction() as conn:
            registry.publish_adapter(
                conn, name="second", base=base, object_id="", digest="", card={}
            )


@pytest.mark.parametrize("name", ["", "Tiny", "../tiny", "a/b", ".a", "a b", "x" * 65, "a\n"])
def test_a_name_is_safe_as_a_folder_and_in_a_url(
    store: Store, registry: Registry, name: str
) -> None:
    with pytest.raises(ModelError, match="cannot be the name"), store.transaction() as conn:
        registry.register_base(conn, name, "models/x", "", {})


@pytest.mark.usefixtures("base")
@pytest.mark.parametrize(
    ("card", "classification", "private"),
    [
        ({}, "sensitive", False),
        (
            {"classification": "synthetic", "epsilon": 3.0, "request": {"purpose": "care"}},
            "synthetic",
            True,
        ),
        ({"classification": "synthetic", "epsilon": 2.5}, "synthetic", True),
        ({"classification": "sensitive", "epsilon": None}, "sensitive", False),
    ],
)
def test_policies_see_the_worst_unless_the_card_says_otherwise(
    store: Store,
    registry: Registry,
    card: dict[str, Any],
    classification: str,
    private: bool,
) -> None:
    publish(store, registry, **card)
    assert registry.model("notes-private").resource.attributes == {
        "kind": "adapter",
        "classification": classification,
        "private": private,
        "purposes": () if "request" not in card else (card["request"]["purpose"],),
    }
    assert registry.model("tiny").resource.attributes["classification"] == "public"
