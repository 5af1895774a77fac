"""Of a site's agent, and of a coordinator, a home has one process; it is free as that one dies."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.coordinators import ORGANISATION, FakeCoordinator
from tests.homes import opened, process_environment, until

from llmos.errors import JobBusy
from llmos.jobs import lease
from llmos.parties import authority
from llmos.server.federation import serve_coordinator
from llmos.system import System
from llmos.workflows import sole_process

HOLDER = """
import sys
import llmos
from llmos.workflows import sole_process
kernel = llmos.open(sys.argv[1], device="cpu", threads=1).kernel
with sole_process.as_site("research.example", kernel), sole_process.as_coordinator(kernel):
    print("held", flush=True)
    sys.stdin.read()
"""


def take_part(system: System) -> None:
    """Take part as a home that is told to stop at once."""
    stop = threading.Event()
    stop.set()
    system.federation.take_part(ORGANISATION, tell=lambda _: None, stop=stop)


def serve(system: System) -> None:
    serve_coordinator(
        system.parts,
        authority.load(system.kernel),
        system.who,
        host="127.0.0.1",
        port=0,
        on_ready=pytest.fail,
        tell=pytest.fail,
    )


@pytest.mark.databases
def test_a_second_one_is_refused_until_the_first_is_gone(home: Path) -> None:
    with opened(home) as system:
        FakeCoordinator().invite(system)
        system.parties.create_authority("own.example")
        with subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(home)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=process_environment(),
        ) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(JobBusy, match="by another process already") as busy:
                take_part(system)
            assert "Ctrl-C" in busy.value.hint
            with pytest.raises(JobBusy, match="runs this home's coordinator already"):
                serve(system)
            with sole_process.as_site("bank.example", system.kernel):
                pass  # another membership is another matter
            holder.kill()
            holder.wait()
        place = lease.place(system.kernel.store, system.kernel.config.home)
        until(lambda: not lease.is_held(place, "coordinator"), deadline_s=10)
        until(lambda: not lease.is_held(place, f"site.{ORGANISATION}"), deadline_s=10)
        take_part(system)
        with sole_process.as_coordinator(system.kernel):
            pass
