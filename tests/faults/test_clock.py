"""A clock that jumps decides nothing but what is a matter of time; the cases are in clock.py."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.faults.acts import prepare
from tests.faults.clock import CASES, TODAY
from tests.faults.injection import REPOSITORY
from tests.homes import process_environment

PLACES = ("x86_64-linux-gnu/", "aarch64-linux-gnu/", "")


@pytest.fixture(scope="module")
def clocked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """Start the process whose clock jumps, on copies of a home with the dataset `notes`."""
    places = [Path(f"/usr/lib/{place}faketime/libfaketime.so.1") for place in PLACES]
    library = next((place for place in places if place.exists()), None)
    if library is None:
        pytest.skip("there is no libfaketime: apt-get install faketime")
    folder = tmp_path_factory.mktemp("clock")
    prepare("ledger", folder)
    file = folder / "now"
    file.write_text(TODAY)
    faked = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_NO_CACHE": "1",
        "TZ": "UTC",
    }
    with subprocess.Popen(
        [sys.executable, "-m", "tests.faults.clock", str(folder / "home"), str(file)],
        cwd=REPOSITORY,
        env=process_environment() | faked,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.communicate()


@pytest.mark.parametrize("case", CASES)
def test_clock(clocked: subprocess.Popen[str], case: str) -> None:
    assert clocked.stdin is not None
    assert clocked.stdout is not None
    clocked.stdin.write(f"{case}\n")
    clocked.stdin.flush()
    told = json.loads(clocked.stdout.readline())
    assert told["held"], told["error"]
