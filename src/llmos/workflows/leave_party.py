"""Leave an organisation: what its jobs hold here is settled first, then the keys are destroyed."""

from __future__ import annotations

from datetime import datetime

from llmos.errors import JobError
from llmos.federations import invitations
from llmos.federations.invitations import InvitationState
from llmos.kernel.identity import Principal
from llmos.parties import memberships
from llmos.workflows import site_holds, sole_process
from llmos.workflows.parts import Parts


def run(organisation: str, who: Principal, parts: Parts, at: datetime) -> list[str]:
    """End a membership and forget its coordinator; return the ids of jobs that hold budget still.

    A job that runs is not left behind, unless the certificate is good no more: then to leave and
    to join again is how this home goes on with it.

    Raises:
        JobError: a job of the organisation runs here.
        JobBusy: this home's agent is at work there.
        UnknownParty: this home is no member.
        PermissionDenied: policy does not let `who` manage parties, or a hold be given back.
    """
    kernel = parts.kernel
    member = memberships.membership(organisation, kernel)
    with sole_process.as_site(organisation, kernel):
        jobs = site_holds.of(organisation, parts)
        running = [job.id for job in jobs if job.state is InvitationState.RUNNING]
        if running and member.is_good(at):
            raise JobError(
                f"{running[0]} of {organisation} runs here and holds budget",
                hint=f"llmos site withdraw {running[0]} --reason TEXT",
            )
        for job in jobs:
            site_holds.give_back(job, parts)
        memberships.leave(
            organisation,
            who,
            kernel,
            also=lambda conn: invitations.forget_coordinator(conn, organisation),
        )
    return running
