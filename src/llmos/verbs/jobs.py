"""The verbs on jobs: look, go on, retry, work, cancel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, Any

from llmos.errors import JobError
from llmos.jobs.jobs import Job, JobState
from llmos.kernel.kernel import Kernel
from llmos.kernel.policy import Action
from llmos.workflows.parts import Parts

if TYPE_CHECKING:
    from llmos.workflows.training_view import OnStep


@dataclass(frozen=True, slots=True)
class JobVerbs:
    """What can be done with jobs."""

    parts: Parts

    def resume(
        self, job_id: str, *, on_step: OnStep | None = None, interrupt: Event | None = None
    ) -> dict[str, Any]:
        """Run a submitted job, or go on with one that was cut off; others' jobs need a right.

        Raises:
            JobError: the job has ended, or it has failed: `retry` wants a reason.
        """
        from llmos.workflows import train

        job = self.parts.jobs.job(job_id)
        if job.state is JobState.FAILED:
            raise JobError(
                f"job {job_id} has failed; it is tried again for a reason",
                hint=f"llmos jobs retry {job_id} --reason TEXT",
            )
        if job.principal != self.parts.who.name:
            self._kernel.monitor.authorize(self.parts.who, Action.MANAGE_JOBS, self._kernel.home)
        show = on_step or (lambda _view: None)
        stop = interrupt or Event()

        def fit(job: Job, results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
            from llmos.workflows.training_job import TrainingJob  # loads the learning stack

            return TrainingJob(self.parts.who, self.parts, stop, show).fit(job, results)

        return train.run(job_id, fit, self.parts.who, self.parts, interrupt=stop)

    def retry(self, job_id: str, *, reason: str, on_step: OnStep | None = None) -> dict[str, Any]:
        """Put a failed job back into the queue, record why, and run it; see `resume`."""
        from llmos.workflows import train

        train.retry(job_id, self.parts.who, self.parts, reason=reason)
        return self.resume(job_id, on_step=on_step)

    def work(
        self,
        *,
        once: bool = True,
        watch: Callable[[str], AbstractContextManager[OnStep]] | None = None,
        report: Callable[[dict[str, Any]], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Run queued and interrupted jobs, oldest first, and return how each was left.

        Without `once` it goes on until Ctrl-C. `watch` makes the callback for a job's steps,
        `report` is called when a job was left.
        """
        from llmos.workflows import worker

        interrupt, done = Event(), list[dict[str, Any]]()
        watched = watch or (lambda _job_id: nullcontext(lambda _view: None))

        def run(job_id: str) -> None:
            with watched(job_id) as on_step:
                self.resume(job_id, on_step=on_step, interrupt=interrupt)

        def left(job: Job, error: str | None) -> None:
            state = self._state(job.id, job.state)
            done.append({"id": job.id, "state": state, "error": error, "result": job.result})
            if report is not None:
                report(done[-1])

        worker.work(self.parts.jobs, run, left, once=once, interrupt=interrupt)
        return done

    def cancel(self, job_id: str) -> JobState:
        """Stop a job at its next step; only steps that were run are charged."""
        from llmos.workflows import train

        return train.cancel(job_id, self.parts.who, self.parts)

    def steps(self, job_id: str) -> int:
        """Return how many steps a job has in all."""
        return int(self.parts.jobs.job(job_id).request["steps"])

    def overview(self) -> list[dict[str, Any]]:
        """Return a line for each job, newest first."""
        return [
            {
                "id": job.id,
                "state": self._state(job.id, job.state),
                "dataset": job.request["dataset"],
                "model": job.request["model"],
                "output": job.request["output"],
                "created_at": job.created_at,
            }
            for job in self.parts.jobs.jobs()
        ]

    def facts(self, job_id: str) -> dict[str, Any]:
        """Return all that is known about a job."""
        job = self.parts.jobs.job(job_id)
        facts: dict[str, Any] = {
            "id": job.id,
            "state": self._state(job.id, job.state),
            "principal": job.principal,
            "created_at": job.created_at,
            "updated_at": job.updated_at,
            "checkpoint": job.checkpoint,
            "error": job.error,
            "result": job.result,
            "request": job.request,
        }
        if job.request["noise_multiplier"] is not None:
            reservation = self._kernel.budget.reservation(job_id)
            facts["reservation"] = f"{reservation.state}, {reservation.steps_done} steps done"
        return facts

    def _state(self, job_id: str, state: JobState) -> str:
        if state is JobState.RUNNING and not self.parts.jobs.is_live(job_id):
            return "interrupted"
        return str(state)

    @property
    def _kernel(self) -> Kernel:
        return self.parts.kernel
