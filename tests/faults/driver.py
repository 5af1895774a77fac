"""A process that does acts again and again, each time in a child of its own whose disk fails.

    LD_PRELOAD=disk.so python -m tests.faults.driver SUBJECT FOLDER

It fills FOLDER with what the acts begin with. Then each line of its input, `COPY FAULT NTH`, names
a copy of that folder. The answer is a line of JSON for each event, the last of which is `ended`.
Starting Python and loading LLMOS takes seconds, forking a process that did takes milliseconds.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.faults import disk
from tests.faults.acts import SUBJECTS, Act, Stage, prepare
from tests.faults.disk import Fault
from tests.faults.state import state

from llmos.errors import StorageError


def main(subject: str, folder: Path) -> None:
    """Serve the lines of the standard input."""
    prepare(subject, folder)
    with TemporaryDirectory() as warm:  # whatever is loaded or computed once is so before the forks
        prepare(subject, Path(warm))
        perform(SUBJECTS[subject], Path(warm), Fault.NONE, 0, describe=True)
    tell(ready=True)
    for line in sys.stdin:
        copy, fault, nth = json.loads(line)
        child = os.fork()
        if child == 0:
            perform(SUBJECTS[subject], Path(copy), Fault(fault), nth, describe=fault == Fault.NONE)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        tell(ended=os.waitstatus_to_exitcode(status))


def perform(acts: tuple[Act, ...], folder: Path, fault: Fault, nth: int, *, describe: bool) -> None:
    """Do the acts in order; after a refusal the disk works again, and so must this process."""
    stage = Stage(folder / "home", tell)
    disk.arm(folder, fault, nth)
    for name, act in acts:
        try:
            try:
                act(stage)
            except StorageError as error:
                calls = disk.heal()
                left = state(stage.system) if stage.is_open else None
                tell(refused=name, error=type(error).__name__, calls=calls, state=left)
                act(stage)
        except Exception:  # noqa: BLE001 - whatever it is, the test has to see it
            tell(broke=name, error=traceback.format_exc())
            return
        tell(done=name, state=state(stage.system) if describe else None)
    stage.close()
    tell(calls=disk.heal())


def tell(**event: Any) -> None:
    """Write an event as a line of JSON, in one call."""
    os.write(1, json.dumps(event).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
