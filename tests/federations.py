"""What tests of federated trainings share: a coordinator and sites, real homes and processes."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from http.client import HTTPSConnection
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.homes import CLI, close, opened, process_environment, run_llmos, until, write_notes

import llmos
from llmos.federations import register
from llmos.kernel.budget import ReservationState
from llmos.parties import memberships
from llmos.parties.tls import Terms, client_context
from llmos.workflows.federated_round import Task

if TYPE_CHECKING:
    from llmos.kernel.budget import Budget
    from llmos.system import System

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
        self.signal(signal.SIGINT)
        assert self.process is not None
        return self.process.wait(60)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let the process stand still for the time of the block."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    @contextmanager
    def slowed(self, share: float = 0.1, period_s: float = 0.5) -> Iterator[None]:
        """Let the process have a share of the time only, as a machine that is so much slower."""
        ended = threading.Event()

        def work() -> None:
            while not ended.wait(period_s * share):
                with self.held():
                    ended.wait(period_s * (1 - share))

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def printed(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def saw(self, pattern: str, times: int = 1) -> re.Match[str]:
        """Wait until a line matches, and return the last match."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            ended = self.process is not None and self.process.poll() is not None
            if len(found := list(re.finditer(pattern, self.printed()))) >= times:
                break
            if ended or time.monotonic() > deadline:
                raise AssertionError(f"{self.name} did not print {pattern!r}:\n{self.printed()}")
            time.sleep(0.05)
        return found[-1]


class Link:
    """A way to a server on this machine that can be cut, as a cable or a proxy can."""

    def __init__(self, port: int) -> None:
        """Forward from a free port to this one."""
        self._port = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self._listening.getsockname()[1]}"
        self._flowing, self._closed = threading.Event(), threading.Event()
        self._flowing.set()
        self._ends: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def cut(self) -> None:
        """Lose everything, both ways and without a word; TCP brings it after `heal`."""
        self._flowing.clear()

    def reset(self) -> None:
        """Close what is open, and what is opened from now on, as a proxy without its server."""
        self._closed.set()
        for end in list(self._ends):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def heal(self) -> None:
        self._closed.clear()
        self._flowing.set()

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self.reset()
        self._flowing.set()
        for thread in self._threads:
            thread.join(60)
        self._listening.close()

    def _start(self, act: Callable[..., None], *arguments: socket.socket) -> threading.Thread:
        thread = threading.Thread(target=act, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def _accept(self) -> None:
        with suppress(OSError):  # of `close`
            while True:
                self._start(self._carry, self._listening.accept()[0])

    def _carry(self, near: socket.socket) -> None:
        with near, suppress(OSError):
            if self._closed.is_set():
                near.recv(1 << 16)
                return
            self._flowing.wait()
            with socket.create_connection(("127.0.0.1", self._port)) as far:
                self._ends |= {near, far}
                back = self._start(self._pump, far, near)
                self._pump(near, far)
                back.join()
                self._ends -= {near, far}

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self._flowing.wait()
                sink.sendall(data)
        self._flowing.wait()
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@dataclass(frozen=True)
class Caller:
    """Calls a coordinator with any certificate and any bytes, as no agent of ours does."""

    port: int
    terms: Terms

    def ask(self, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Return status and body of the answer."""
        context = client_context(self.terms)
        connection = HTTPSConnection("127.0.0.1", self.port, context=context, timeout=30)
        try:
            connection.request("GET" if body is None else "POST", path, body=body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def poll(self) -> list[dict[str, Any]]:
        """Return all instructions."""
        status, body = self.ask("/federation/poll", b"{}")
        assert status == 200, body
        instructions: list[dict[str, Any]] = json.loads(body)["instructions"]
        return instructions

    def send(self, task: Task, body: bytes, phase: str = "upload") -> tuple[int, str]:
        """Send a message of a round; return status and the message of a refusal."""
        path = f"/federation/jobs/{task.job}/rounds/{task.round}/{task.attempt}/{phase}"
        status, answer = self.ask(path, body)
        return status, "" if status == 200 else str(json.loads(answer)["error"]["message"])


@dataclass
class Federation:
    """A coordinator and its sites."""

    folder: Path
    coordinator: Member
    sites: dict[str, Member]
    url: str = ""
    port: int = 0
    links: dict[str, Link] = field(default_factory=dict)  # of the sites that have one
    _stack: ExitStack = field(default_factory=ExitStack)
    _office: System | None = None

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
        url = self.links[name].url if name in self.links else self.url
        self.sites[name].start("site", "join", url, "--token", token)

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

    # what tests of faults look at

    @property
    def office(self) -> System:
        """The coordinator's home, open in this process for as long as the federation is there."""
        if self._office is None:
            self._office = self._stack.enter_context(opened(self.coordinator.home))
        return self._office

    def status(self, job: str) -> dict[str, Any]:
        """Return the attempt under way."""
        return register.job(self.office.kernel.store, job).status or {}

    def rounds(self, job: str) -> list[dict[str, Any]]:
        return register.rounds(self.office.kernel.store, job)

    def recovered(self, job: str, since: datetime, *names: str, without: str = "") -> float:
        """Wait for a round that was done after `since`, with these sites; return the seconds."""

        def found() -> list[float]:
            return [
                (datetime.fromisoformat(row["at"]) - since).total_seconds()
                for row in self.rounds(job)
                if datetime.fromisoformat(row["at"]) > since
                and {self.uri(name) for name in names} <= set(row["sites"])
                and not (without and self.uri(without) in row["sites"])
            ]

        try:
            until(lambda: bool(found()), deadline_s=PATIENCE_S)
        except AssertionError as error:
            raise AssertionError(self.story()) from error
        return found()[0]

    def uri(self, name: str) -> str:
        return f"spiffe://{ORGANISATION}/party/{name}"

    def caller(self, name: str) -> Caller:
        """Call as a site, with its own certificate and key."""
        with opened(self.sites[name].home) as system:
            kernel = system.kernel
            return Caller(self.port, memberships.membership(ORGANISATION, kernel).terms(kernel))

    def records(self, job: str) -> list[dict[str, Any]]:
        """Return what the coordinator's verified log says about a job, oldest first."""
        with opened(self.coordinator.home) as system:
            size = system.log.verify()
            details = [entry["details"] for _, entry in system.log.read(limit=size)]
        return [one for one in details if one.get("job") == job]

    def check(self, job: str, *names: str) -> list[dict[str, Any]]:
        """Hold the state after an ended job against what no fault may change; return its rounds.

        The rounds follow on each other, each of them over the weights that the last one left; each
        site's ledger is settled and adds up; the logs verify.
        """
        with opened(self.coordinator.home) as system:
            system.log.verify()
        rounds = self.rounds(job)
        assert [row["round"] for row in rounds] == list(range(len(rounds)))
        assert all(a["weights_after"] == b["weights_before"] for a, b in pairwise(rounds))
        for name in names or tuple(self.sites):
            home = self.sites[name].home
            with opened(home) as system:
                system.log.verify()
                budget = system.kernel.budget
                until(partial(self._is_settled, budget, job))
                assert budget.reservation(job).state is ReservationState.COMMITTED
                pool, again = budget.pool("notes"), budget.recompute("notes")
                assert (pool.spent, pool.held) == (again.spent, again.held)
        return rounds

    def verify_logs(self) -> None:
        """Let the command verify the log of every home."""
        for member in (self.coordinator, *self.sites.values()):
            verified = run_llmos(member.home, "log", "verify")
            assert verified.returncode == 0, verified.stderr

    @staticmethod
    def _is_settled(budget: Budget, job: str) -> bool:
        return budget.reservation(job).state is not ReservationState.HELD

    def steps(self, name: str, job: str) -> int:
        """Return the steps that a site was charged for."""
        with opened(self.sites[name].home) as system:
            return system.kernel.budget.reservation(job).steps_done

    def story(self) -> str:
        """Return all that was printed, for the message of a failed test."""
        members = (self.coordinator, *self.sites.values())
        return "\n".join(f"--- {one.name}\n{one.printed()}" for one in members)

    def close(self) -> None:
        for member in (*self.sites.values(), self.coordinator):
            if member.process is not None and member.process.poll() is None:
                member.process.kill()
                member.process.wait()
        for link in self.links.values():
            link.close()
        self._stack.close()


@contextmanager
def federation(
    folder: Path,
    model: Path,
    names: tuple[str, ...] = ("east", "north", "south"),
    units: int = 24,
    classification: str = "sensitive",
    linked: tuple[str, ...] = (),
) -> Iterator[Federation]:
    """Make homes with a model and data, start the coordinator, and let the sites join.

    Those that are `linked` join by a link that can be cut.
    """
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
        federated.links = {name: Link(federated.port) for name in linked}
        for name in names:
            federated.join(name)
        yield federated
    finally:
        federated.close()
