"""A home of another organisation on this machine, and the `llmos` process that runs for it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from llmos.config import child_environment
from llmos.errors import JobError

_LOOK_S: Final = 0.05
_END_S: Final = 60.0


@dataclass(slots=True)
class Place:
    """One home, with what its process has printed."""

    name: str
    home: Path
    settings: Mapping[str, str] = field(default_factory=dict)  # LLMOS_..., for its processes
    process: subprocess.Popen[bytes] | None = None

    @property
    def output(self) -> Path:
        """Where its process prints, beside the home: nothing but keys and data lives in it."""
        return self.home.with_suffix(".out")

    def start(self, *arguments: str) -> None:
        """Start a command that stays; what it prints is appended to `output`."""
        program = [sys.executable, "-m", "llmos.cli.main"]
        with self.output.open("ab") as out:
            self.process = subprocess.Popen(  # noqa: S603 - our own program, without a shell
                [*program, "--home", str(self.home), *arguments],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=child_environment(PYTHONUNBUFFERED="1", **self.settings),
            )

    def printed(self) -> str:
        """Return all that its processes have printed."""
        return self.output.read_text(encoding="utf-8") if self.output.exists() else ""

    def wait_for(self, pattern: str, *, times: int = 1, timeout_s: float = 300.0) -> re.Match[str]:
        """Wait until a pattern was printed so many times, and return the last match.

        Raises:
            JobError: the process has ended before, or the time is over.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            ended = self.process is None or self.process.poll() is not None
            if len(found := list(re.finditer(pattern, self.printed()))) >= times:
                return found[-1]
            if ended or time.monotonic() > deadline:
                last = self.printed().strip().rpartition("\n")[2]
                raise JobError(
                    f"{self.name} does not go on: {last or 'it printed nothing'}",
                    hint=f"all that it printed is in {self.output}",
                )
            time.sleep(_LOOK_S)

    def kill(self) -> None:
        """End the process as a power cut does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> None:
        """End the process; one that does not end is killed.

        Not by SIGINT: whoever runs us in the background of a script has us, and so it, ignore that.
        """
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.kill()
