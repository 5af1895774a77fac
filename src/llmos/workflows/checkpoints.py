"""Checkpoints of a training job: a kill loses nothing, and an erasure leaves no unbounded one."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace

from llmos.data import erasures
from llmos.data.datasets import DatasetCard
from llmos.jobs.jobs import Job
from llmos.kernel.monitor import Grant
from llmos.workflows.parts import Parts


@dataclass(slots=True)
class Checkpoints:
    """Saves states in the one safe order: charge, write, point to it, delete the one before."""

    parts: Parts
    grant: Grant
    job: Job
    card: DatasetCard
    charged: bool
    erased: int  # units that the data had lost when they were read
    _newest: str | None = None

    def __post_init__(self) -> None:
        """Begin with the checkpoint that the job has."""
        self._newest = self.job.checkpoint

    def save(self, state: bytes, steps: int) -> None:
        """Keep a state, unless it holds an erased person and no guarantee bounds what it holds."""
        if self.charged:
            self.grant.progress(steps)
        vault = self.parts.kernel.vault
        object_id = vault.put("checkpoint", state)
        with ExitStack() as undo:
            undo.callback(vault.delete, object_id)
            with self.parts.kernel.store.transaction() as conn:
                erased = len(erasures.names(conn, self.card.object_id))
                if not self.charged and erased != self.erased:
                    return
                self.parts.jobs.set_checkpoint(conn, self.job, object_id)
            undo.pop_all()
        before, self._newest = self._newest, object_id
        if before is not None:
            vault.delete(before)


def drop(job: Job, parts: Parts) -> Job:
    """Remove a job's checkpoint, if it has one, and return the job, which then begins anew.

    Raises:
        JobOvertaken: another run of the job has begun since `job` was read.
    """
    if job.checkpoint is not None:
        with parts.kernel.store.transaction() as conn:
            parts.jobs.set_checkpoint(conn, job, None)
        parts.kernel.vault.delete(job.checkpoint)
    return replace(job, checkpoint=None)
