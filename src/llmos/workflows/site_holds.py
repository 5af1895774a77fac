"""What federated jobs that have ended at a site still hold: budget, and an update in the vault.

To give it back takes this home only, no coordinator, certificate or membership.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from llmos.errors import LlmosError
from llmos.federations import invitations
from llmos.federations.invitations import ENDED, Invitation, InvitationState
from llmos.kernel.budget import ReservationState
from llmos.workflows import site_settlement
from llmos.workflows.parts import Parts

AGAIN_S: Final = 600.0  # after a try that policy refused; each one is logged
LEFT: Final = ENDED - {InvitationState.DONE}  # a job that is done was settled as it ended


def of(organisation: str, parts: Parts) -> list[Invitation]:
    """Return the jobs that an organisation asked for, newest first."""
    jobs = invitations.invitations(parts.kernel.store)
    return [job for job in jobs if job.organisation == organisation]


def holds(job: Invitation, parts: Parts) -> bool:
    """Tell whether a job has budget or an update that nobody has given back."""
    if job.plan is None:
        return False
    if job.update_object is not None:
        return True
    if job.manifest.privacy is None:
        return False
    return parts.kernel.budget.reservation(job.id).state is ReservationState.HELD


def give_back(job: Invitation, parts: Parts) -> None:
    """Settle a job that ended here before its last round, if it was not settled yet.

    Raises:
        PermissionDenied: policy no longer lets the coordinator ask for anything; the hold stays.
    """
    if job.state in LEFT and holds(job, parts):
        site_settlement.release(job, parts)


@dataclass(slots=True)
class SiteHolds:
    """Gives back, for as long as an agent runs, what its jobs hold as they end."""

    organisation: str
    parts: Parts
    tell: Callable[[str], None]
    _from: dict[str, float] = field(default_factory=dict)  # monotonic: of the next try

    def settle(self) -> None:
        """Give back what all ended jobs hold, whether their coordinator can be reached or not."""
        for job in of(self.organisation, self.parts):
            self.release(job)

    def release(self, job: Invitation) -> None:
        """Give back what a job holds if it has ended; what fails is tried again, not at once."""
        if job.state not in LEFT or time.monotonic() < self._from.get(job.id, 0.0):
            return
        try:
            give_back(job, self.parts)
        except LlmosError as error:
            self._from[job.id] = time.monotonic() + AGAIN_S
            self.tell(f"{job.id}: its budget is still held: {error.message}")
        else:
            self._from[job.id] = math.inf
