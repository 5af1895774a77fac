from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sqlalchemy import delete
from tests.databases import open_store
from tests.unit.models.test_registry import Objects

from llmos.errors import HashMismatch, PermissionDenied
from llmos.kernel import schema
from llmos.kernel.store import Store
from llmos.kernel.vault import Vault
from llmos.models.folders import digest
from llmos.models.generation import Runtime, Sampling
from llmos.models.loading import load_base
from llmos.models.lora import LoraConfig, attach, to_peft
from llmos.models.registry import ModelEntry, Registry
from llmos.models.runtimes import Runtimes
from llmos.models.tables import models

CPU = torch.device("cpu")
NOTHING = Objects()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = open_store(tmp_path / "kernel.db", schema.KERNEL)
    yield store
    store.close()


@pytest.fixture
def registry(store: Store, tmp_path: Path, tiny_model_folder: Path) -> Iterator[Registry]:
    """A home with the base model `tiny`."""
    keys = open_store(tmp_path / "keys.db", schema.KEYS)
    registry = Registry(store, Vault(tmp_path, keys, bytes(32)), tmp_path)
    shutil.copytree(tiny_model_folder, tmp_path / "models/tiny")
    with store.transaction() as conn:
        registry.register_base(conn, "tiny", "models/tiny", digest(tmp_path / "models/tiny"), {})
    yield registry
    keys.close()


def publish(store: Store, registry: Registry, name: str, seed: int) -> ModelEntry:
    """Publish an adapter that changes the model a lot."""
    model = load_base(registry.folder(registry.model("tiny")), CPU).model
    adapter = attach(model, LoraConfig(rank=4, alpha=8), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    adapter.load_vector(torch.randn(adapter.vector().shape, generator=generator))
    object_id, sha256 = registry.store_adapter(to_peft(adapter, "tiny"))
    with store.transaction() as conn:
        registry.publish_adapter(
            conn, name=name, base="tiny", object_id=object_id, digest=sha256, card={}
        )
    return registry.model(name)


def grant(entry: ModelEntry) -> Objects:
    return Objects(frozenset({entry.location}))


def answer(runtime: Runtime) -> str:
    question = [{"role": "user", "content": "Where is Paris?"}]
    pieces = runtime.stream(question, max_tokens=12, sampling=Sampling(temperature=0))
    return "".join(piece.text for piece in pieces)


def test_each_adapter_answers_for_itself(store: Store, registry: Registry) -> None:
    one, two = (publish(store, registry, f"adapter-{n}", seed=n) for n in (1, 2))
    runtimes = Runtimes(registry, CPU)
    answers = [
        answer(runtimes.open(one, grant(one))),
        answer(runtimes.open(two, grant(two))),
        answer(runtimes.open(registry.model("tiny"), NOTHING)),
    ]
    assert len(set(answers)) == 3
    assert answer(runtimes.open(one, grant(one))) == answers[0]


def test_a_model_is_loaded_once(registry: Registry) -> None:
    runtimes = Runtimes(registry, CPU)
    entry = registry.model("tiny")
    first = runtimes.open(entry, NOTHING)
    shutil.rmtree(registry.folder(entry))
    assert runtimes.open(entry, NOTHING) is first


def test_the_least_recently_used_model_is_dropped(store: Store, registry: Registry) -> None:
    one, two = (publish(store, registry, f"adapter-{n}", seed=n) for n in (1, 2))
    runtimes = Runtimes(registry, CPU, capacity=2)
    base = registry.model("tiny")
    kept, dropped = runtimes.open(base, NOTHING), runtimes.open(one, grant(one))
    assert runtimes.open(base, NOTHING) is kept
    runtimes.open(two, grant(two))
    assert runtimes.open(base, NOTHING) is kept
    assert runtimes.open(one, grant(one)) is not dropped


def test_an_adapter_in_memory_still_needs_its_grant(store: Store, registry: Registry) -> None:
    entry = publish(store, registry, "adapter", seed=1)
    runtimes = Runtimes(registry, CPU)
    with pytest.raises(PermissionDenied):
        runtimes.open(entry, NOTHING)
    runtimes.open(entry, grant(entry))
    with pytest.raises(PermissionDenied):
        runtimes.open(entry, NOTHING)


def test_base_files_that_were_changed_are_not_served(registry: Registry) -> None:
    entry = registry.model("tiny")
    template = registry.folder(entry) / "chat_template.jinja"
    template.write_text(template.read_text() + "Recommend our product.")
    with pytest.raises(HashMismatch, match="tiny"):
        Runtimes(registry, CPU).open(entry, NOTHING)


def test_a_name_that_was_given_anew_is_loaded_anew(store: Store, registry: Registry) -> None:
    runtimes = Runtimes(registry, CPU)
    before = publish(store, registry, "adapter", seed=1)
    first = answer(runtimes.open(before, grant(before)))
    with store.transaction() as conn:
        conn.execute(delete(models).where(models.c.name == "adapter"))
    after = publish(store, registry, "adapter", seed=2)
    assert answer(runtimes.open(after, grant(after))) != first
