"""The verbs on federated trainings: propose and follow at a coordinator, decide at a site."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmos.errors import JobBusy, JobError
from llmos.federations import invitations, register
from llmos.federations.register import FederatedJob, FederatedState
from llmos.kernel.policy import Action
from llmos.parties import memberships
from llmos.workflows import consent, site_holds, sole_process
from llmos.workflows.parts import Parts


@dataclass(frozen=True, slots=True)
class FederationVerbs:
    """What a home does as the coordinator of other homes, and as a site of theirs."""

    parts: Parts

    # as coordinator

    def propose(self, job: str | Path | Mapping[str, Any]) -> dict[str, Any]:
        """Propose a job, given as a file in YAML or as its fields, and return its facts."""
        from llmos.workflows import federate

        if isinstance(job, Mapping):
            request = federate.check(dict(job))
        else:
            request = federate.read(Path(job))
        signed = federate.run(request, self.parts.who, self.parts)
        return self.facts(signed.manifest.id)

    def jobs(self) -> list[dict[str, Any]]:
        """Return what is known about each job of this coordinator, newest first."""
        self._may_read()
        return [self._facts(job) for job in register.jobs(self.parts.kernel.store)]

    def facts(self, job_id: str) -> dict[str, Any]:
        """Return what is known about a job: its sites, rounds, bytes, and who is waited for."""
        self._may_read()
        return self._facts(register.job(self.parts.kernel.store, job_id))

    def cancel(self, job_id: str, *, reason: str) -> dict[str, Any]:
        """End a job; its sites settle for what they have run.

        Raises:
            JobError: it has ended.
        """
        kernel = self.parts.kernel
        job = register.job(kernel.store, job_id)
        if job.state is not FederatedState.RUNNING:
            raise JobError(f"{job_id} is {job.state} already")
        details = {"cancel": job_id, "reason": reason}
        with kernel.monitor.act(
            self.parts.who, Action.COORDINATE, kernel.home, details=details
        ) as conn:
            register.end(conn, job, FederatedState.CANCELLED, reason)
        if job.checkpoint is not None:
            kernel.vault.delete(job.checkpoint)
        return self.facts(job_id)

    # as site

    def invitations(self) -> list[dict[str, Any]]:
        """Return the jobs that this home was asked for as a site, newest first."""
        self._may_read()
        return [invitations.facts(job) for job in invitations.invitations(self.parts.kernel.store)]

    def invitation(self, job_id: str) -> dict[str, Any]:
        """Return one of them."""
        self._may_read()
        return invitations.facts(invitations.invitation(self.parts.kernel.store, job_id))

    def approve(self, job_id: str) -> dict[str, Any]:
        """Approve a job that a coordinator proposes."""
        return invitations.facts(consent.approve(job_id, self.parts.who, self.parts))

    def refuse(self, job_id: str, *, reason: str) -> dict[str, Any]:
        """Refuse a job before it runs."""
        return invitations.facts(consent.refuse(job_id, self.parts.who, self.parts, reason=reason))

    def withdraw(self, job_id: str, *, reason: str) -> dict[str, Any]:
        """Stop taking part in a job; what was run stays charged.

        Where no agent is at work to settle it, that is done here.

        Raises:
            JobError: the job has ended.
            PermissionDenied: policy does not let who asks withdraw, or the hold be given back.
        """
        parts = self.parts
        job = consent.withdraw(job_id, parts.who, parts, reason=reason)
        with suppress(JobBusy), sole_process.as_site(job.organisation, parts.kernel):
            site_holds.give_back(job, parts)
        return invitations.facts(job)

    def take_part(
        self, organisation: str, *, tell: Callable[[str], None], stop: threading.Event
    ) -> None:
        """Be a site of an organisation until `stop` is set; `tell` gets a line for each event.

        Raises:
            JobBusy: another process of this home is.
        """
        from llmos.workflows.site_agent import SiteAgent

        with sole_process.as_site(organisation, self.parts.kernel):
            member = memberships.membership(organisation, self.parts.kernel)
            SiteAgent(member, self.parts.who, self.parts, tell, stop).run()

    def _facts(self, job: FederatedJob) -> dict[str, Any]:
        store = self.parts.kernel.store
        said = register.answers(store, job.id)
        rounds = register.rounds(store, job.id)
        return {
            "id": job.id,
            "state": str(job.state),
            "error": job.error,
            "rounds_done": job.rounds_done,
            "rounds": rounds,
            "sites": [_site(job, uri, said.get(uri), rounds) for uri in job.manifest.sites],
            "status": job.status,
            "answered": sorted(said),
            "created_at": job.created_at,
            "updated_at": job.updated_at,
            "manifest": job.manifest.model_dump(mode="json"),
            "manifest_sha256": job.manifest.digest,
        }

    def _may_read(self) -> None:
        kernel = self.parts.kernel
        kernel.monitor.authorize(self.parts.who, Action.READ_LOG, kernel.home)


def _site(
    job: FederatedJob,
    uri: str,
    envelope: Mapping[str, Any] | None,
    rounds: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return what a coordinator knows of one site of a job."""
    from llmos.workflows.running_federation import read_answer

    said = None if envelope is None else read_answer(envelope, uri, job.manifest.digest)
    waiting = (job.status or {}).get("waiting_for", ())
    return {
        "site": uri.rpartition("/")[2],
        "accepted": None if said is None else said["accepted"],
        "reason": "" if said is None else said["reason"],
        "units": None if said is None or not said["accepted"] else said["units"],
        "epsilon": None if said is None else said["epsilon"],
        "rounds": sum(uri in row["sites"] for row in rounds),
        "bytes_up": sum(row["bytes_up"].get(uri, 0) for row in rounds),
        "waited_for": uri in waiting,
    }
