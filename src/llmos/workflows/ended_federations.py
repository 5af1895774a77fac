"""Federated jobs that have ended: sites hear of it, fetch weights, state what they spent."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from llmos.errors import UnknownJob
from llmos.federations import register
from llmos.federations.register import FederatedJob, FederatedState
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.parties import authority
from llmos.reports import site_part
from llmos.reports.site_part import SitePart
from llmos.workflows import federated_state
from llmos.workflows.federated_state import weights_bytes
from llmos.workflows.parts import Parts


class EndedFederations:
    """The ended jobs of one coordinator; its lock guards all but the checking of statements."""

    def __init__(self, who: Principal, parts: Parts) -> None:
        """Begin without jobs."""
        self._who = who
        self._parts = parts
        self._jobs: dict[str, FederatedJob] = {}
        self._weights: dict[str, str] = {}  # SHA-256 of what those that are done have learnt
        self._unstated: dict[str, set[str]] = {}  # sites that owe a statement

    def __contains__(self, job_id: object) -> bool:
        """Tell whether a job has ended."""
        return job_id in self._jobs

    def add(self, job_id: str) -> None:
        """Take up a job that has ended."""
        store = self._parts.kernel.store
        job = self._jobs[job_id] = register.job(store, job_id)
        if job.state is not FederatedState.DONE:
            return
        rounds = register.rounds(store, job_id)
        self._weights[job_id] = str(rounds[-1]["weights_after"])
        if job.manifest.privacy is not None:
            # also who left before the first round was done: others have trained beside it
            asked = set(register.answers(store, job_id))
            self._unstated[job_id] = asked - set(register.statements(store, job_id))

    def instructions(self, site: str) -> list[dict[str, Any]]:
        """Return what a site has to know about its ended jobs."""
        return [
            {
                "job": job.id,
                "kind": "ended",
                "state": str(job.state),
                "weights_sha256": self._weights.get(job.id),
                "statement_wanted": site in self._unstated.get(job.id, ()),
            }
            for job in self._jobs.values()
            if site in job.manifest.sites
        ]

    def weights(self, site: str, job_id: str, digest: str) -> bytes:
        """Return what a job has learnt, as float32.

        Raises:
            UnknownJob: the site has no such job, or these are not its weights.
        """
        job = self._jobs[job_id]
        if site not in job.manifest.sites or self._weights.get(job_id) != digest:
            raise UnknownJob(f"{job_id} has no such weights now")
        return weights_bytes(federated_state.load(job, self._who, self._parts))

    def check(self, site: str, job_id: str, part: Mapping[str, Any]) -> SitePart:
        """Check what a site states after a job; it takes a second, so no lock is held meanwhile.

        Raises:
            UnknownJob: no statement of it is wanted, or not any more.
            VerificationFailed: a signature or proof in it is wrong, or its numbers do not follow.
        """
        if site not in self._unstated.get(job_id, ()):
            raise UnknownJob(f"no statement of {site} about {job_id!r} is wanted")
        at = datetime.now(UTC)
        anchor = authority.load(self._parts.kernel).anchor(self._who, at)
        return site_part.verify(part, site, (anchor,), self._jobs[job_id].manifest)

    def keep(self, site: str, job_id: str, part: Mapping[str, Any], said: SitePart) -> None:
        """Keep and record a statement that was checked."""
        if site not in self._unstated[job_id]:
            return
        kernel = self._parts.kernel
        digest = hashlib.sha256(said.statement.payload).hexdigest()
        details = {"job": job_id, "site": site, "statement_sha256": digest}
        with kernel.monitor.act(self._who, Action.COORDINATE, kernel.home, details=details) as conn:
            register.keep_statement(conn, job_id, site, part)
        self._unstated[job_id].discard(site)
