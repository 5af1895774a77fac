"""A process that forks writers on one home and kills them, as its standard input says.

    python -m tests.faults.writers HOME

`["start", 7, 3]` starts writer 7, which first settles what writer 3 left held; `["kill", 7]` kills
it and waits for its death. What a writer has done it tells as a line of JSON after the act, so that
all of its lines stand before the line of its death.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import signal
import sys
from itertools import count
from pathlib import Path
from typing import Final

from tests.faults.acts import Stage
from tests.faults.driver import tell

from llmos.errors import BudgetExceeded
from llmos.kernel.budget import ReservationState
from llmos.privacy import PoissonSampledGaussian

JOB: Final = PoissonSampledGaussian(0.05, 4.0, 40)  # some fifty fit into the pool


def main(home: Path) -> None:
    """Serve the lines of the standard input."""
    warm = Stage(home)
    write(warm, "w0-0")  # what is loaded or computed once is so before the forks
    warm.close()
    running: dict[int, int] = {}
    for line in sys.stdin:
        match json.loads(line):
            case ["start", int(writer), int(heir_of)]:
                running[writer] = os.fork()
                if running[writer] == 0:
                    live(Stage(home), writer, heir_of)
            case ["kill", int(writer)]:
                process = running.pop(writer)
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                tell(gone=writer)
    for process in running.values():
        os.kill(process, signal.SIGKILL)


def live(stage: Stage, writer: int, heir_of: int) -> None:
    """Settle what a dead writer left held, then write for ever."""
    for left in stage.system.kernel.budget.reservations("notes"):
        if left.id.startswith(f"w{heir_of}-") and left.state is ReservationState.HELD:
            stage.admit(left.id, JOB)
            settle(stage, left.id, max(1, left.steps_done))
    for number in count():
        write(stage, f"w{writer}-{number}")


def write(stage: Stage, key: str) -> None:
    """Reserve, and settle or abort; add to the log; put an object, and perhaps delete it again."""
    try:
        stage.admit(key, JOB)
    except BudgetExceeded:
        tell(exceeded=key)
    else:
        tell(reserved=key)
        if secrets.randbelow(3):
            stage.grants[key].progress(3)
            tell(progressed=key, steps=3)
            settle(stage, key, 20 + secrets.randbelow(20))
        else:
            stage.grants[key].abort()
            tell(aborted=key)
    number = secrets.randbits(48)
    stage.append(number)
    tell(appended=number)
    content = secrets.token_bytes(secrets.randbelow(50_000))
    stage.put(key, content)
    tell(put=stage.objects[key], digest=hashlib.sha256(content).hexdigest())
    if secrets.randbelow(2):
        tell(deleting=stage.objects[key])
        stage.delete(key)
        tell(deleted=stage.objects[key])


def settle(stage: Stage, key: str, steps: int) -> None:
    """Settle for so many steps."""
    stage.grants[key].settle(JOB.after(steps))
    tell(settled=key, steps=steps)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
