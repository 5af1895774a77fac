"""Work: run the jobs that are queued or were interrupted, oldest first, one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Event
from typing import Any, Final

from llmos.errors import JobBusy, JobOvertaken
from llmos.jobs.jobs import Job, Jobs, JobState, public_text
from llmos.workflows.ctrl_c import stopped_by_ctrl_c

_LOOK_EVERY_S: Final = 1.0


def work(
    jobs: Jobs,
    run: Callable[[str], Any],
    report: Callable[[Job, str | None], None],
    *,
    once: bool,
    interrupt: Event,
) -> None:
    """Run what waits and report how each job was left, with what stopped it; None is its end.

    A job that another live process runs is left to it. A job that fails does not stop the worker,
    which takes it again only after someone has changed it. With `once` the worker ends when no job
    waits any more, else at Ctrl-C, which sets `interrupt`: the job stops at a step boundary.
    """
    left: dict[str, Job] = {}
    with stopped_by_ctrl_c(interrupt):
        while not interrupt.is_set():
            job = next((job for job in _waiting(jobs) if left.get(job.id) != job), None)
            if job is not None:
                try:
                    error = _attempt(run, job.id)
                except (JobBusy, JobOvertaken):
                    continue  # another process was quicker
                left[job.id] = jobs.job(job.id)
                report(left[job.id], error)
            elif once:
                return
            else:
                interrupt.wait(_LOOK_EVERY_S)


def _waiting(jobs: Jobs) -> Iterator[Job]:
    """Yield the jobs that have not ended and that no process runs, oldest first."""
    for job in reversed(jobs.jobs()):
        if job.state in (JobState.QUEUED, JobState.RUNNING) and not jobs.is_live(job.id):
            yield job


def _attempt(run: Callable[[str], Any], job_id: str) -> str | None:
    """Run a job and say what stopped it before its end, if anything did."""
    try:
        run(job_id)
    except (JobBusy, JobOvertaken):
        raise
    except Exception as error:  # noqa: BLE001 - no job's fault may end the worker
        return public_text(error)
    return None
