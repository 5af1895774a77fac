"""A home of another organisation: its process is waited for, and told apart from one that died."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.parties import kernel_at

from llmos.cli.place import Place
from llmos.errors import JobError


@pytest.fixture
def place(tmp_path: Path) -> Place:
    with kernel_at(tmp_path / "east"):
        pass
    return Place("east", tmp_path / "east")


def test_a_process_that_ends_says_why(place: Place) -> None:
    with pytest.raises(JobError, match="it printed nothing"):
        place.wait_for("anything")  # nothing was started
    place.start("site", "up")
    assert place.process is not None
    assert place.process.wait(60) != 0
    with pytest.raises(JobError, match=r"east does not go on: .*site join URL") as refused:
        place.wait_for("takes part")
    assert str(place.output) in str(refused.value.hint)
    assert place.wait_for("joined 0 federations")[0] == "joined 0 federations"
    place.stop()  # it has ended: nothing is left to do


def test_a_process_that_stays_is_waited_for_and_stopped(place: Place) -> None:
    place.start("coordinator", "up", "--organisation", "research.example", "--port", "0")
    try:
        port = int(place.wait_for(r"coordinator of research.example at https://\S+:(\d+)")[1])
        assert port > 0
        with pytest.raises(JobError, match="does not go on"):
            place.wait_for("a line that never comes", timeout_s=0.2)
        place.stop()
        assert place.process is not None
        assert place.process.returncode == 0
        place.start("coordinator", "up", "--port", str(port))
        place.wait_for("coordinator of", times=2)  # the first process's line does not count again
    finally:
        place.kill()
    assert place.process is not None
    assert place.process.returncode == -9


def test_a_process_that_ignores_ctrl_c_is_stopped_at_once(place: Place) -> None:
    # as everything does that a script runs in the background
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{deaf}; print('deaf', flush=True); time.sleep(600)"],
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"deaf\n"
        place.process = process
        place.stop()
        assert process.returncode == -15
