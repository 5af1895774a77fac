"""A disk that fails: which faults there are, the library that makes them, and its switches."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from enum import IntEnum
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("disk.c")


class Fault(IntEnum):
    """What happens at the Nth call that changes a file; the order is that of disk.c."""

    NONE = 0
    IO_ERROR = 1  # the call fails with EIO, later ones do not
    FULL = 2  # from then on whatever needs room fails with ENOSPC
    SHORT_WRITE = 3  # half of the bytes are written, then the disk is full
    KILL = 4  # SIGKILL, with half of the bytes written
    POWER_CUT = 5  # SIGKILL; bytes and names that were not synchronised are lost
    LOST_DATA = 6  # SIGKILL; only the names last, as on file systems that delay allocation


def compiled(folder: Path) -> Path:
    """Compile the library into a folder, or skip the test where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler: apt-get install gcc libc6-dev")
    library = folder / "disk.so"
    options = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *options, "-o", str(library), str(SOURCE)], check=True)
    return library


def arm(folder: Path, fault: Fault, nth: int) -> None:
    """Let call `nth` fail, in a process that has the library preloaded."""
    ctypes.CDLL(None).disk_arm(str(folder).encode(), int(fault), ctypes.c_long(nth))


def heal() -> int:
    """End the faults; return how many calls were counted."""
    healed = ctypes.CDLL(None).disk_heal
    healed.restype = ctypes.c_long
    return int(healed())
