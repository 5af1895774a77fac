"""Faults injected at every call in turn, and what must hold of the home after each of them."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.faults import disk
from tests.faults.acts import PASSPHRASE, SUBJECTS
from tests.faults.disk import Fault
from tests.faults.state import state
from tests.homes import checked_books, opened, process_environment

if TYPE_CHECKING:
    from llmos.system import System

REPOSITORY = Path(__file__).parents[2]
FAULTS = [pytest.param(fault, id=fault.name.lower()) for fault in Fault if fault is not Fault.NONE]
EVERY_CALL = "EVERY_CALL" in os.environ  # noqa: TID251 - `make nightly` sets it
# Otherwise each third, fifth or eleventh call is hit, from one that is drawn anew in each run. The
# steps are odd because SQLite writes a page in two calls. Making a home has many calls in one act.
_STEPS = {Fault.KILL: 3, Fault.IO_ERROR: 5, Fault.POWER_CUT: 5}
_LARGE_STEPS = {"making": 31, "import": 9, "training": 17}


@dataclass(slots=True)
class Trial:
    """What was told about the acts on one copy of the home."""

    done: list[str] = field(default_factory=list)
    states: list[dict[str, Any] | None] = field(default_factory=list)  # after each act that is done
    refused: list[dict[str, Any]] = field(default_factory=list)
    broke: list[str] = field(default_factory=list)
    saved: int = 0  # the step of the newest checkpoint that was told of
    calls: int = 0
    ended: int = 0  # exit status, negative: the signal

    def reached(self, nth: int) -> bool:
        """Tell whether there were so many calls."""
        return self.ended == -9 or self.calls >= nth


@dataclass(frozen=True, slots=True)
class Injector:
    """A driver process for the acts of one subject."""

    subject: str
    process: subprocess.Popen[str]
    folder: Path  # where copies are made
    states: list[dict[str, Any] | None]  # before the first act and after each
    finish: Callable[[System, Trial], None] | None  # goes on with an act that has parts

    def trial(self, fault: Fault, nth: int) -> tuple[Trial, Path]:
        """Do the acts on a fresh copy; return what was told, and the copy."""
        copy = self.folder / f"{fault.name.lower()}-{nth}"
        shutil.copytree(self.folder / "prepared", copy)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([str(copy), int(fault), nth]) + "\n")
        self.process.stdin.flush()
        return _told(self.process, "ended"), copy

    def sweep(self, fault: Fault) -> int:
        """Inject a fault at one call after the other, until two runs in a row had fewer calls.

        Return how many runs it hit.
        """
        step = 1 if EVERY_CALL else _LARGE_STEPS.get(self.subject, _STEPS.get(fault, 11))
        hit = clean = 0
        for nth in count(1 + secrets.randbelow(step), step):
            trial, copy = self.trial(fault, nth)
            hit, clean = (hit + 1, 0) if trial.reached(nth) else (hit, clean + 1)
            self.examine(trial, copy, f"{self.subject}, {fault.name} at call {nth}")
            shutil.rmtree(copy)
            if clean == 2:
                return hit
        raise AssertionError("there is always a last call")

    def examine(self, trial: Trial, copy: Path, where: str) -> None:
        """Look at a home from outside: what was acknowledged is there, and no half of an act."""
        assert not trial.broke, f"{where}: {trial.broke}"
        killed = trial.ended == -9
        assert trial.ended in {0, -9}, where
        done = len(trial.done)
        assert killed or done == len(SUBJECTS[self.subject]), where
        allowed = self.states[done : done + 2] if killed else [self.states[done]]
        for refusal in trial.refused:
            assert refusal["error"] in {"StorageError", "StorageFull"}, where
        home = copy / "home"
        if not home.exists():
            assert None in allowed, where
            return
        with opened(home, passphrase=PASSPHRASE) as system:
            if self.finish is None:
                left = state(system)
                assert left in allowed, f"{where}: {left} is none of {allowed}"
            else:
                self.finish(system, trial)
                assert _ended(state(system)) == _ended(self.states[-1]), where
            checked_books(system, strays=10)
            assert not list(home.glob("objects/??/*.part")) or killed, where


@contextmanager
def injector(
    subject: str, folder: Path, finish: Callable[[System, Trial], None] | None = None
) -> Iterator[Injector]:
    """Start a driver; do its acts once on a disk that works, to know the states in between."""
    prepared = folder / "prepared"
    prepared.mkdir()
    library = disk.compiled(folder)
    environment = process_environment() | {"LD_PRELOAD": str(library)}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.faults.driver", subject, str(prepared)],
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            _told(process, "ready")
            made = Injector(subject, process, folder, [], finish)
            trial, copy = made.trial(Fault.NONE, 0)
            assert (trial.ended, trial.broke) == (0, []), trial
            made.states.extend([_before(prepared / "home"), *trial.states])
            shutil.rmtree(copy)
            yield made
        finally:
            process.kill()


def _ended(left: dict[str, Any] | None) -> dict[str, Any]:
    """Return a state without the records of attempts, of which an interrupted act has more."""
    assert left is not None
    ends = [record for record in left["records"] if record[1] == "settled"]
    return left | {"records": ends}


def _before(home: Path) -> dict[str, Any] | None:
    if not home.exists():
        return None
    with opened(home) as system:
        return state(system)


def _told(process: subprocess.Popen[str], last: str) -> Trial:
    """Read events up to one of this kind."""
    trial = Trial()
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        match event:
            case {"done": name, "state": left}:
                trial.done.append(name)
                trial.states.append(left)
            case {"refused": _}:
                trial.refused.append(event)
                trial.calls = event["calls"]
            case {"broke": name, "error": error}:
                trial.broke.append(f"{name}: {error}")
            case {"saved": step}:
                trial.saved = step
            case {"calls": calls}:
                trial.calls = max(trial.calls, calls)
            case {"ended": status}:
                trial.ended = status
        if last in event:
            return trial
    raise AssertionError("the driver ended")
