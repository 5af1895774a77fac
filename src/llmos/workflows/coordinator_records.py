"""What a coordinator writes down of its jobs: acts in its log and tables, and lines for people."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection

from llmos.errors import LlmosError, StorageError, UpdateRefused
from llmos.federations import register
from llmos.federations.register import FederatedJob, FederatedState
from llmos.jobs.jobs import public_text
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.workflows.parts import Parts
from llmos.workflows.running_federation import Running

_LOG: Final = logging.getLogger("llmos.server")


@dataclass(frozen=True, slots=True)
class CoordinatorRecords:
    """The records of one coordinator; each of them may raise StorageError or PermissionDenied."""

    who: Principal
    parts: Parts
    tell: Callable[[str], None]

    def answer(
        self, job_id: str, site: str, said: Mapping[str, Any], envelope: Mapping[str, Any]
    ) -> None:
        """Keep what a site signed."""
        details = {"job": job_id, "site": site, "accepted": said["accepted"]}
        with self._act(details) as conn:
            register.keep_answer(conn, job_id, site, envelope)
        word = "takes part" if said["accepted"] else f"does not take part: {said['reason']}"
        self.tell(f"{job_id}: {site} {word}")

    def refusal(self, job_id: str, refused: UpdateRefused) -> None:
        """Record whose message was refused, and why."""
        self.tell(f"{job_id}: {refused.message}")
        with self._act({"job": job_id, "refused": refused.site, "why": refused.message}):
            pass

    def abort(self, run: Running, why: str) -> None:
        """Record that a round begins again."""
        self.tell(f"{run.job.id}: round {run.state.round + 1} begins again: {why}")
        with self._act({"job": run.job.id, "round": run.state.round, "aborted": why}):
            pass

    def failure(self, job: FederatedJob, error: Exception) -> None:
        """End a job that cannot go on, and delete its checkpoint.

        Raises:
            JobError: it has ended already.
        """
        why = error.message if isinstance(error, LlmosError) else public_text(error)
        details = {"job": job.id, "ended": str(FederatedState.FAILED), "why": why}
        with self._act(details) as conn:
            register.end(conn, job, FederatedState.FAILED, why)
        if not isinstance(error, LlmosError):
            frames = "".join(traceback.format_tb(error.__traceback__))
            _LOG.error("%s failed with %s\n%s", job.id, why, frames)
        self.discard(job.checkpoint)
        self.tell(f"{job.id}: {FederatedState.FAILED}: {why}")

    def status(self, run: Running) -> None:
        """Let `llmos federate show` see the attempt under way, when it has changed."""
        status = run.status()
        if status == run.told:
            return
        try:
            with self.parts.kernel.store.transaction() as conn:
                register.tell(conn, run.job.id, status)
        except StorageError:  # it is told with the next change
            return
        run.told = status

    def discard(self, checkpoint: str | None) -> None:
        """Delete a checkpoint that no job names any more."""
        if checkpoint is None:
            return
        try:
            self.parts.kernel.vault.delete(checkpoint)
        except StorageError as error:
            self.tell(f"an old checkpoint stays in the vault: {error.message}")

    def _act(self, details: Mapping[str, Any]) -> AbstractContextManager[Connection]:
        kernel = self.parts.kernel
        return kernel.monitor.act(self.who, Action.COORDINATE, kernel.home, details=details)
