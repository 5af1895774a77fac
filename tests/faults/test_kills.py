"""Four processes that reserve, settle, record and store, killed two hundred times at random."""

from __future__ import annotations

import hashlib
import json
import secrets
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.faults.acts import prepare
from tests.faults.injection import EVERY_CALL, REPOSITORY
from tests.faults.state import Everything
from tests.faults.writers import JOB
from tests.homes import checked_books, opened, process_environment

from llmos.errors import StorageError
from llmos.system import System

WRITERS = 4
KILLS = 2000 if EVERY_CALL else 200
Told = dict[str, dict[Any, dict[str, Any]]]  # kind of act -> its subject -> all that was told


class Writers:
    """The writers of one home, those that are alive and what all of them told."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._alive: list[int] = []
        self._started = self.kills = 0
        self.told: Told = defaultdict(dict)
        for _ in range(WRITERS):
            self.replace(0)

    def hear(self) -> str:
        """Read one line, note it, and return what kind of act it tells."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the writers ended"
        event = json.loads(line)
        kind = str(next(iter(event)))
        self.told[kind][event[kind]] = event
        return kind

    def kill(self) -> int:
        """Kill one at random and hear all that it did; return its number."""
        victim = self._alive.pop(secrets.randbelow(len(self._alive)))
        self._send("kill", victim)
        while victim not in self.told["gone"]:
            self.hear()
        self.kills += 1
        return victim

    def replace(self, victim: int) -> None:
        """Start a writer; first it settles what a dead one held."""
        self._started += 1
        self._alive.append(self._started)
        self._send("start", self._started, victim)

    def _send(self, *command: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[Writers]:
    prepare("ledger", tmp_path)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.faults.writers", str(tmp_path / "home")],
        cwd=REPOSITORY,
        env=process_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Writers(process)
        finally:
            process.communicate()  # the end of its input: it kills those that are left


def test_two_hundred_kills_lose_nothing_and_overspend_nothing(
    writers: Writers, tmp_path: Path
) -> None:
    while writers.kills < KILLS:
        for _ in range(secrets.randbelow(12)):
            writers.hear()
        if writers.kills % 50 < 50 - WRITERS:
            writers.replace(writers.kill())
        else:  # now and then all of them: whoever comes next finds a log that nobody has open
            victims = [writers.kill() for _ in range(WRITERS)]
            with opened(tmp_path / "home") as system:
                check(system, writers.told)
            for victim in victims:
                writers.replace(victim)
    assert len(writers.told["settled"]) > 20
    assert writers.told["exceeded"]  # the pool was empty at last, and stayed within its cap


def check(system: System, told: Told) -> None:
    """Find all that was told; each reservation was charged once, for what was told or is next."""
    checked_books(system, strays=10**6)
    kernel = system.kernel
    (pool,) = kernel.budget.pools()
    assert 0 <= pool.spent + pool.held <= pool.cap
    ledger = {found.id: found for found in kernel.budget.reservations(pool.id)}
    assert told["reserved"].keys() <= ledger.keys()
    assert not told["exceeded"].keys() & ledger.keys()
    for key, progress in told["progressed"].items():
        assert ledger[key].steps_done >= progress["steps"]
    for key, settled in told["settled"].items():
        assert ledger[key].state == "committed"
        assert ledger[key].mechanism == JOB.after(settled["steps"])
    assert all(ledger[key].state == "aborted" for key in told["aborted"])
    size = kernel.auditlog.verify().size
    records = [entry.fields for entry in kernel.auditlog.entries(limit=size)]
    assert told["appended"].keys() <= {record.get("number") for record in records}
    charged = [r["details"]["job"] for r in records if r.get("outcome") == "settled"]
    assert len(charged) == len(set(charged)) == sum(f.state == "committed" for f in ledger.values())
    for object_id, put in told["put"].items():
        if object_id not in told["deleting"]:
            plain = kernel.vault.read(object_id, "note", Everything())
            assert hashlib.sha256(plain).hexdigest() == put["digest"]
    for object_id in told["deleted"]:
        with pytest.raises(StorageError, match="there is no object"):
            kernel.vault.read(object_id, "note", Everything())
