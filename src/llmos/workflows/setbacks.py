"""What keeps a coordinator's jobs from going on for a while: a full disk, a lock, a policy.

Such a job is as it was, loses nothing, and is tried again after a rest; whoever runs the
coordinator is told once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from llmos.errors import AccessError, LlmosError, StorageError

REST_S: Final = 5.0  # a locked database has kept the coordinator waiting for long already
PASSING: Final = (StorageError, AccessError)  # of the home, not of the job


@dataclass(slots=True)
class Setbacks:
    """Which jobs rest, and why."""

    tell: Callable[[str], None]
    _why: dict[str, str] = field(default_factory=dict)
    _since: dict[str, float] = field(default_factory=dict)

    def rests(self, job_id: str) -> bool:
        """Tell whether a job is to be left alone now."""
        return time.monotonic() - self._since.get(job_id, -REST_S) < REST_S

    def suffer(self, job_id: str, error: LlmosError) -> None:
        """Let a job rest, and tell why unless that was told last."""
        self._since[job_id] = time.monotonic()
        if self._why.get(job_id) != error.message:
            self._why[job_id] = error.message
            self.tell(f"{job_id}: cannot go on now and is tried again: {error.message}")

    def overcome(self, job_id: str) -> None:
        """Forget what kept a job from going on."""
        self._why.pop(job_id, None)
        self._since.pop(job_id, None)
