"""Fixtures that many tests share: a tiny random Llama with a real byte-level tokenizer."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from tests import postgresql
from tests.clinics import import_clinic
from tests.databases import copy_home
from tests.homes import close, opened, write_notes

if TYPE_CHECKING:
    from llmos.kernel.kernel import Kernel
    from llmos.system import System
    from llmos.workflows.parts import Parts

SQLITE, POSTGRESQL = DATABASES = ("sqlite", "postgresql")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "The patient was admitted with chest pain and treated with aspirin.",
    "What is the capital of France? The capital of France is Paris.",
    "Patient Maria Lopez, age 54, ward cardiology: asthma, glucose 120.",
]


def make_tiny_tokenizer() -> Any:
    """Train a byte-level BPE tokenizer: every text has an encoding, digits stay apart."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `make nightly` try more: more flips, more sequences, longer fuzzing."""
    parser.addoption("--long", type=int, default=1, metavar="FACTOR", help="try so many times more")
    parser.addoption("--nightly", action="store_true", help="run tests that take many minutes too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave what takes many minutes to `make nightly`."""
    if not config.getoption("--nightly"):
        later = [item for item in items if item.get_closest_marker("nightly")]
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=later)


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> int:
    """Return how many times more than in CI is tried."""
    return int(request.config.getoption("--long"))


def pytest_configure(config: pytest.Config) -> None:
    """Let Ctrl-C reach the processes that tests start; what runs in the background ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    more = int(config.getoption("--long"))
    settings.register_profile(
        "machines", max_examples=10 * more, stateful_step_count=20, deadline=None
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests that are marked `databases` on both, and all on what LLMOS_TEST_DATABASE says."""
    chosen = os.environ.get("LLMOS_TEST_DATABASE", SQLITE)  # noqa: TID251 - no setting of ours
    assert chosen in DATABASES, f"LLMOS_TEST_DATABASE is one of {DATABASES}"
    marks = {mark.name for mark in metafunc.definition.iter_markers()}
    wanted: tuple[str, ...] = (chosen,)
    if POSTGRESQL in marks:
        wanted = (POSTGRESQL,)
    elif "databases" in marks and SQLITE not in marks and chosen == SQLITE:
        wanted = DATABASES
    if wanted != (SQLITE,):
        metafunc.parametrize("database", wanted, indirect=True, scope="session")


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[postgresql.Server]:
    """Start a PostgreSQL server; its folder has a short name, as sockets need."""
    if not postgresql.is_installed():
        pytest.skip(postgresql.MISSING)
    with (
        tempfile.TemporaryDirectory(prefix="llmos-pg-") as folder,
        postgresql.running(Path(folder)) as server,
    ):
        yield server


@pytest.fixture(scope="session", autouse=True)
def database(request: pytest.FixtureRequest) -> Iterator[str]:
    """Let homes and stores be made on the database that the test is run on."""
    name = getattr(request, "param", SQLITE)
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("LLMOS_DATABASE_URL", raising=False)
        if name == POSTGRESQL:
            server = request.getfixturevalue("postgresql_server")
            environment.setenv("LLMOS_DATABASE_URL", server.url)
        yield name


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is about SQLite's files before its fixtures, for the reason that it gives."""
    marker, call = item.get_closest_marker("sqlite"), getattr(item, "callspec", None)
    if marker is not None and call is not None and call.params.get("database") == POSTGRESQL:
        pytest.skip(f"SQLite only: {marker.args[0]}")


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a random two-layer Llama in Hugging Face format; its weights are always the same."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = make_tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pull the real SmolLM2-135M the way users do; the verified download stays in the cache."""
    from llmos import config
    from llmos.models import hub

    folder = tmp_path_factory.mktemp("models") / "smollm2-135m"
    hub.pull("smollm2-135m", folder, config.load().cache)
    return folder


@dataclass(frozen=True)
class ServedHome:
    """A real home with the base model `tiny` and its adapter `notes`."""

    parts: Parts

    def key(self, name: str, role: str, *models: str) -> str:
        """Add a principal with one role and return the token of its key; no names: all models."""
        from llmos.kernel.identity import Role
        from llmos.kernel.policy import Action

        kernel = self.parts.kernel
        identity, here = kernel.identity, kernel.home
        with kernel.monitor.act(kernel.principal(), Action.MANAGE_KEYS, here) as conn:
            who = identity.add_principal(conn, name, frozenset({Role(role)}))
            scope = frozenset(models) or None
            return identity.create_key(conn, who, "test", scope, None).token

    def records(self, action: str) -> list[dict[str, Any]]:
        """Return the log's entries about one action, oldest first."""
        entries = [json.loads(entry) for entry in log_entries(self.parts.kernel)]
        return [entry for entry in entries if entry["action"] == action]


def log_entries(kernel: Kernel) -> list[bytes]:
    """Return the log's raw entries."""
    from sqlalchemy import select

    from llmos.kernel.schema import log_entries as table

    with kernel.store.read() as conn:
        return list(conn.execute(select(table.c.data).order_by(table.c.idx)).scalars())


@pytest.fixture(scope="module")
def served_home(
    tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory, database: str
) -> Iterator[ServedHome]:
    """Make the home through the public door and publish a random adapter in it."""
    import torch

    from llmos import system
    from llmos.models.folders import digest
    from llmos.models.loading import load_base
    from llmos.models.lora import LoraConfig, attach, to_peft

    home = tmp_path_factory.mktemp("home") / "home"
    parts = system.create(home, device="cpu").parts
    shutil.copytree(tiny_model_folder, home / "models/tiny")
    model = load_base(tiny_model_folder, torch.device("cpu")).model
    adapter = attach(model, LoraConfig(rank=4, alpha=8), seed=1)
    generator = torch.Generator().manual_seed(1)
    adapter.load_vector(torch.randn(adapter.vector().shape, generator=generator))
    object_id, sha256 = parts.registry.store_adapter(to_peft(adapter, "tiny"))
    with parts.kernel.store.transaction() as conn:
        parts.registry.register_base(conn, "tiny", "models/tiny", digest(tiny_model_folder), {})
        parts.registry.publish_adapter(
            conn,
            name="notes",
            base="tiny",
            object_id=object_id,
            digest=sha256,
            card={"dataset": "notes", "classification": "sensitive", "epsilon": 3.0},
        )
    yield ServedHome(parts)
    parts.kernel.store.close()


@pytest.fixture(scope="session")
def prepared_home(
    tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory, database: str
) -> Path:
    """Make a home with the model `tiny` and the datasets `notes` and `ward`; only to be copied."""
    import llmos

    folder = tmp_path_factory.mktemp("prepared")
    notes = write_notes(folder / "notes.jsonl")
    system = llmos.create(folder / "home", device="cpu", threads=1)
    system.pull(str(tiny_model_folder), name="tiny")
    for name, classification in (("notes", "synthetic"), ("ward", "sensitive")):
        system.import_data(
            notes,
            name=name,
            unit="patient_id",
            text="text",
            classification=classification,
            epsilon=8,
            delta=1e-5,
            holdout=0,
        )
    close(system)
    return folder / "home"


@pytest.fixture
def home(prepared_home: Path, tmp_path: Path) -> Path:
    """Return a fresh copy of the prepared home."""
    return copy_home(prepared_home, tmp_path / "home")


@pytest.fixture(scope="session")
def clinic_home(prepared_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Add the datasets `clinic` and `study` of the same patients; only to be copied."""
    folder = tmp_path_factory.mktemp("clinic")
    copy_home(prepared_home, folder / "home")
    import_clinic(folder / "home", folder)
    return folder / "home"


@pytest.fixture
def system(home: Path) -> Iterator[System]:
    """Open a fresh copy of the prepared home."""
    with opened(home) as system:
        yield system


@pytest.fixture(scope="session")
def measured_home(
    tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory, database: str
) -> Path:
    """Make a home with `plain` (learnt by heart) and `private`, both measured; to be copied."""
    import llmos

    folder = tmp_path_factory.mktemp("measured")
    system = llmos.create(folder / "home", device="cpu", threads=1)
    system.pull(str(tiny_model_folder), name="tiny")
    system.import_data(
        write_notes(folder / "notes.jsonl", units=40),
        unit="patient_id",
        text="text",
        classification="synthetic",
        epsilon=8,
        delta=1e-5,
        holdout=0.5,
        canaries=120,
    )
    common: dict[str, Any] = {"dataset": "notes", "model": "tiny", "max_tokens": 32}
    system.train(**common, output="plain", private=False, steps=240, batch=16, learning_rate=0.01)
    units = system.datasets.card("notes").units
    system.train(**common, output="private", epsilon=3, steps=8, batch=units)
    system.measure("plain", "private")
    close(system)
    return folder / "home"


@pytest.fixture(scope="session")
def refuted_home(measured_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Add `noiseless`, trained without the noise that its ledger entry of epsilon 1 promises."""
    from llmos.engines.dp import trainer

    home = tmp_path_factory.mktemp("refuted") / "home"
    copy_home(measured_home, home)
    with opened(home) as system, pytest.MonkeyPatch.context() as broken:
        broken.setattr(trainer, "add_gaussian", lambda *_: None)
        system.train(
            dataset="notes",
            model="tiny",
            output="noiseless",
            max_tokens=32,
            epsilon=1,
            steps=120,
            batch=system.datasets.card("notes").units,
            learning_rate=4,
        )
    return home


@pytest.fixture
def measured(measured_home: Path, tmp_path: Path) -> Iterator[System]:
    """Open a fresh copy of the measured home."""
    copy_home(measured_home, tmp_path / "home")
    with opened(tmp_path / "home") as system:
        yield system


@pytest.fixture
def refuted(refuted_home: Path, tmp_path: Path) -> Iterator[System]:
    """Open a fresh copy of the home whose model `noiseless` breaks its promise."""
    copy_home(refuted_home, tmp_path / "home")
    with opened(tmp_path / "home") as system:
        yield system
