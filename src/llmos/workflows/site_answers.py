"""What a site has answered its coordinator for each job, and what it still owes.

An answer that did not arrive is owed until it does. What is owed follows from what the coordinator
says, not from how old a job is: one that has ended there waits for nobody's answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from llmos.errors import NetworkError, RequestError
from llmos.federations.invitations import Invitation
from llmos.workflows.site_channel import SiteChannel

_UNANSWERED: Final = "manifest"  # the instruction for a job of which there is no answer
_NOT_COUNTED_ON: Final = "wait"  # ... of which this site owes nothing at the moment
_ENDED: Final = "ended"


@dataclass(slots=True)
class SiteAnswers:
    """The answers of one process; another one before it may have given some."""

    channel: SiteChannel
    tell: Callable[[str], None]
    _said: dict[str, str] = field(default_factory=dict)  # the coordinator, last, of running jobs
    _given: dict[str, tuple[bool, float]] = field(default_factory=dict)  # with its time

    def hear(self, instructions: Iterable[Mapping[str, Any]], asked_at: float) -> None:
        """Take note of what the coordinator says of all jobs, when it was asked at that time.

        Who was asked before it got an answer cannot know of it.
        """
        kinds = {str(one["job"]): str(one.get("kind")) for one in instructions}
        self._said = {job: kind for job, kind in kinds.items() if kind != _ENDED}
        for job, (_, at) in list(self._given.items()):
            if self._said.get(job) == _UNANSWERED and at < asked_at:
                del self._given[job]

    def owed(self, job_id: str, *, accepted: bool) -> bool:
        """Tell whether the coordinator has to hear this answer, and can be reached.

        A no of an earlier process is not said again to a coordinator that does not count on us.
        """
        said, given = self._said.get(job_id), self._given.get(job_id)
        if said is None or (given is not None and given[0] is accepted):
            return False
        return accepted or given is not None or said != _NOT_COUNTED_ON

    def give(self, job: Invitation, *, accepted: bool, **said: Any) -> None:  # noqa: ANN401
        """Answer; what does not arrive is owed when the coordinator is heard of again."""
        try:
            self.channel.answer(job, accepted=accepted, **said)
        except NetworkError as error:
            self.tell(f"{job.id}: the answer did not arrive: {error.message}")
            self._said.pop(job.id, None)
            return
        except RequestError as error:  # the job has ended: nobody waits for an answer
            self.tell(f"{job.id}: {error.message}")
        self._given[job.id] = accepted, time.monotonic()
