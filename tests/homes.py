"""What the tests of a whole home share: notes to learn from, and the check of its books."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import llmos
from llmos import config as configuration
from llmos.federations import invitations, register
from llmos.kernel import kernel as kernels
from llmos.kernel import root
from llmos.kernel.schema import standing_digest
from llmos.kernel.store import now

if TYPE_CHECKING:
    from llmos.system import System

UNITS = 24
ENDLESS: Final = 50_000  # steps: more than any machine takes while a test looks on
CLI = str(Path(sys.executable).with_name("llmos"))
# All units are drawn in every step: their mechanism is the quickest to account for.
TRAINING: Final[dict[str, Any]] = {
    "dataset": "notes",
    "model": "tiny",
    "epsilon": 3.0,
    "steps": 8,
    "batch": UNITS,
    "rank": 4,
    "max_tokens": 32,
}


def write_notes(path: Path, units: int = UNITS) -> Path:
    """Write one short note of each patient as JSON Lines."""
    texts = {f"p{n}": f"Patient {n}: asthma, {n * n}." for n in range(units)}
    notes = [json.dumps({"patient_id": unit, "text": text}) for unit, text in texts.items()]
    path.write_text("".join(note + "\n" for note in notes))
    return path


@contextmanager
def opened(home: Path, **settings: Any) -> Iterator[System]:
    """Open a home in this process and close its databases afterwards."""
    system = llmos.open(home, device="cpu", threads=1, **settings)
    try:
        yield system
    finally:
        close(system)


@dataclass(frozen=True)
class Person:
    """Someone with an API key in a file of their own."""

    home: Path
    key_file: Path

    @contextmanager
    def at_work(self) -> Iterator[System]:
        with opened(self.home, api_key_file=self.key_file) as system:
            yield system


def hire(home: Path, name: str, role: str, folder: Path, *, kind: str = "person") -> Person:
    """Add a person, or a service, and give them a key."""
    with opened(home) as system:
        system.access.add_user(name, [role], kind=kind)
        token = system.access.create_key(user=name).token
    file = folder / f"{name}.key"
    file.write_text(f"{token}\n")
    file.chmod(0o600)
    return Person(home, file)


def close(system: System) -> None:
    """Close the databases of a home."""
    system.kernel.store.close()
    system.kernel.vault._store.close()


def run_llmos(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Type a command of the installed command line and wait for its end."""
    return subprocess.run(
        [CLI, "--home", str(home), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env=process_environment() | environment,
    )


@contextmanager
def training(home: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Type `llmos train` for the notes."""
    arguments = ["--data", "notes", "--model", "tiny", "--epsilon", "3", "--batch", str(UNITS)]
    with running(home, "train", *arguments, "--max-tokens", "32", *options) as process:
        yield process


@contextmanager
def running(home: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Type a command; whatever happens, its process is gone after the block."""
    with subprocess.Popen(
        [CLI, "--home", str(home), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=process_environment(),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def process_environment() -> dict[str, str]:
    """Return this process's environment with no setting of ours but the database, on one thread."""
    inherited = {
        name: value
        for name, value in os.environ.items()  # noqa: TID251
        if name == "LLMOS_DATABASE_URL" or not name.startswith("LLMOS_")
    }
    return inherited | {"LLMOS_DEVICE": "cpu", "LLMOS_THREADS": "1", "OMP_NUM_THREADS": "1"}


def until(condition: Callable[[], bool], *, deadline_s: float = 60.0) -> None:
    """Look again and again until a condition holds."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "this did not happen in time"
        threading.Event().wait(0.02)


def wait_for_step(process: subprocess.Popen[str], step: int) -> str:
    """Read what a training says until it shows this step, and return it."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith(f"  step {step}/"):
            return said
    raise AssertionError(f"the training ended before step {step}: {process.stderr.read()}")  # type: ignore[union-attr]


def kill_after_step(process: subprocess.Popen[str], step: int) -> int:
    """Wait until a training shows this step, kill it, and return the last step that it showed."""
    said = wait_for_step(process, step)
    process.kill()
    assert process.stdout is not None
    rest = process.stdout.read()  # `communicate` would lose what is buffered already
    process.wait()
    return max(int(shown) for shown in re.findall(r"^  step (\d+)/", said + rest, re.MULTILINE))


@dataclass(frozen=True)
class Books:
    """What a refused act must leave as it was."""

    datasets: tuple[str, ...]
    models: tuple[str, ...]
    jobs: tuple[tuple[str, str], ...]  # id, state
    pools: tuple[tuple[str, int, int], ...]  # dataset, spent, held
    objects: frozenset[str]


def books(home: Path, *, strays: int = 0, **settings: Any) -> Books:
    """Verify log, ledger and vault of a home from the outside, and return what they hold.

    `strays` objects that nothing refers to are tolerated: those that a kill can leave behind.
    """
    with opened(home, **settings) as system:
        return checked_books(system, strays=strays)


def checked_books(system: System, *, strays: int = 0) -> Books:
    """Verify log, ledger and vault of an opened home, and return what they hold."""
    kernel = system.kernel
    kernel.auditlog.verify()
    for pool in kernel.budget.pools():
        assert kernel.budget.recompute(pool.id) == pool.balance
        reserved = kernel.budget.reservations(pool.id)
        assert pool.spent == sum(r.costs[pool.id] for r in reserved if r.state == "committed")
        assert pool.held == sum(r.costs[pool.id] for r in reserved if r.state == "held")
    files = {path.name for path in kernel.config.home.glob("objects/??/*")}
    with kernel.vault._store.read() as conn:
        keys = set(conn.exec_driver_sql("SELECT object_id FROM object_keys").scalars())
    known = {
        object_id
        for card in system.datasets.cards()
        for object_id in (card.object_id, card.holdout_object_id, card.canary_object_id)
    }
    known |= {entry.location for entry in system.registry.models() if entry.kind == "adapter"}
    known |= {job.checkpoint for job in system.parts.jobs.jobs() if job.checkpoint is not None}
    kept = {job.checkpoint for job in register.jobs(kernel.store)}
    kept |= {job.update_object for job in invitations.invitations(kernel.store)}
    known |= {object_id for object_id in kept if object_id is not None}
    assert known <= files & keys
    assert len((files | keys) - known) <= strays
    return Books(
        datasets=tuple(card.name for card in system.datasets.cards()),
        models=tuple(entry.name for entry in system.registry.models()),
        jobs=tuple((job.id, str(job.state)) for job in system.parts.jobs.jobs()),
        pools=tuple((pool.id, pool.spent, pool.held) for pool in kernel.budget.pools()),
        objects=frozenset(files),
    )


def record_state(home: Path) -> None:
    """Let the log name the standing tables as they are, as only the holder of its key can."""
    config = configuration.load(home=home)
    with ExitStack() as stores:
        opened_stores = kernels._open_stores(config, stores)
        kernel = kernels._assemble(config, opened_stores, root.unlock(config))
        entry = {
            "v": 1,
            "at": now(),
            "actor": "admin",
            "action": "test",
            "resource": "",
            "outcome": "",
        }
        with kernel.store.transaction() as conn:
            state = standing_digest(conn)
            kernel.auditlog.append(conn, {**entry, "details": {"policies": []}, "state": state})


def log_size(system: System) -> int:
    """Return how many entries the verified log has."""
    return system.kernel.auditlog.verify().size


def last_records(system: System, count: int) -> list[dict[str, Any]]:
    """Return the log's newest entries, oldest first."""
    size = log_size(system)
    return [entry.fields for entry in system.kernel.auditlog.entries(size - count - 1, count)]
