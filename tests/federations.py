"""What tests of federated trainings share: a coordinator and sites, real homes and processes."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.homes import CLI, close, opened, process_environment, write_notes

import llmos

ORGANISATION: Final = "research.example"
PATIENCE_S: Final = 240.0  # a busy machine starts a process in many seconds


@dataclass
class Member:
    """One home of a federation, and its process while it runs."""

    name: str
    home: Path
    output: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str, **environment: str) -> None:
        """Type a command that stays; what it prints is appended to `output`."""
        with self.output.open("ab") as out:
            self.process = subprocess.Popen(
                [CLI, "--home", str(self.home), *arguments],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=process_environment() | {"PYTHONUNBUFFERED": "1"} | environment,
            )

    def kill(self) -> None:
        """Kill the process, as a power cut does."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def interrupt(self) -> int:
        """Press Ctrl-C and return the exit status."""
        assert self.process is not None
        self.process.send_signal(2)
        return self.process.wait(60)

    def printed(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def saw(self, pattern: str, times: int = 1) -> re.Match[str]:
        """Wait until a line matches, and return the last match."""
        deadline = time.monotonic() + PATIENCE_S
        while len(found := list(re.finditer(pattern, self.printed()))) < times:
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.name} did not print {pattern!r}:\n{self.printed()}")
            time.sleep(0.05)
        return found[-1]


@dataclass
class Federation:
    """A coordinator and its sites."""

    folder: Path
    coordinator: Member
    sites: dict[str, Member]
    url: str = ""
    port: int = 0
    _stack: ExitStack = field(default_factory=ExitStack)

    def up(self) -> None:
        """Start the coordinator, on the same port as before."""
        seen = len(re.findall("coordinator of", self.coordinator.printed()))
        self.coordinator.start("coordinator", "up", "--port", str(self.port))
        self.url = self.coordinator.saw(r"coordinator of \S+ at (https://\S+)", seen + 1)[1]
        self.port = int(self.url.rpartition(":")[2])

    def join(self, name: str) -> None:
        """Invite a site, which joins and takes part."""
        with opened(self.coordinator.home) as system:
            token = system.parties.invite(name).text
        self.sites[name].start("site", "join", self.url, "--token", token)

    def propose(self, **fields: Any) -> str:
        """Propose a job and return its id."""
        job = {"model": "tiny", "data": "notes", "sites": sorted(self.sites), "max_tokens": 32}
        with opened(self.coordinator.home) as system:
            facts = system.federation.propose(job | {"rank": 4, "batch": 8, "rounds": 2} | fields)
        return str(facts["id"])

    def approve(self, job: str, *names: str) -> None:
        """Let the sites' stewards approve a job."""
        for name in names or tuple(self.sites):
            self.sites[name].saw(f"{job} waits for a steward")
            with opened(self.sites[name].home) as system:
                assert system.federation.approve(job)["state"] == "approved"

    def facts(self, job: str) -> dict[str, Any]:
        with opened(self.coordinator.home) as system:
            return system.federation.facts(job)

    def finished(self, job: str) -> dict[str, Any]:
        """Wait until a job has ended, at the coordinator and at the sites that ran it."""
        self.coordinator.saw(rf"{job}: (done|failed|cancelled)")
        return self.facts(job)


@contextmanager
def federation(
    folder: Path,
    model: Path,
    names: tuple[str, ...] = ("east", "north", "south"),
    units: int = 24,
    classification: str = "sensitive",
) -> Iterator[Federation]:
    """Make homes with a model and data, start the coordinator, and let the sites join."""
    members = {name: Member(name, folder / name, folder / f"{name}.out") for name in names}
    coordinator = Member("coordinator", folder / "coordinator", folder / "coordinator.out")
    federated = Federation(folder, coordinator, members)
    for place, member in enumerate((coordinator, *members.values())):
        close(llmos.create(member.home))
        with opened(member.home) as system:
            system.pull(str(model), name="tiny")
            if member is not coordinator:
                notes = write_notes(folder / f"{member.name}.jsonl", units + place)
                system.import_data(
                    notes,
                    unit="patient_id",
                    epsilon=8,
                    delta=1e-4,
                    name="notes",
                    text="text",
                    classification=classification,
                )
    with opened(coordinator.home) as system:
        system.parties.create_authority(ORGANISATION)
    try:
        federated.up()
        for name in names:
            federated.join(name)
        yield federated
    finally:
        for member in (*members.values(), coordinator):
            if member.process is not None and member.process.poll() is None:
                member.process.kill()
                member.process.wait()
