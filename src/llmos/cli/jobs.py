"""`llmos jobs`: list, show, resume, retry, cancel and work on jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from llmos.cli.session import (
    Session,
    device_option,
    json_option,
    print_fields,
    print_json,
    print_table,
    with_session,
)
from llmos.errors import JobError

if TYPE_CHECKING:
    from llmos.system import System
    from llmos.workflows.training_view import OnStep


@click.group()
def jobs() -> None:
    """List, show, resume, retry, cancel and work on jobs."""


@jobs.command("ls")
@json_option
@with_session
def list_(session: Session, as_json: bool) -> None:
    """List the jobs, newest first."""
    rows = session.system().jobs.overview()
    if as_json:
        print_json(rows)
        return
    print_table(
        "jobs",
        ("id", "state", "dataset", "model", "output", "made"),
        [
            (r["id"], r["state"], r["dataset"], r["model"], r["output"], r["created_at"])
            for r in rows
        ],
    )


@jobs.command()
@click.argument("job_id")
@json_option
@with_session
def show(session: Session, job_id: str, as_json: bool) -> None:
    """Show a job: request, state, reservation and result."""
    facts = session.system().jobs.facts(job_id)
    if as_json:
        print_json(facts)
        return
    print_fields(facts)


@jobs.command()
@click.argument("job_id")
@device_option
@json_option
@with_session
def resume(session: Session, job_id: str, as_json: bool) -> None:
    """Go on with a job that was killed or interrupted; nothing is charged twice."""
    _run(session, job_id, session.system().jobs.resume, as_json=as_json)


@jobs.command()
@click.argument("job_id")
@click.option("--reason", required=True, help="Why it will work now; kept in the audit log.")
@device_option
@json_option
@with_session
def retry(session: Session, job_id: str, reason: str, as_json: bool) -> None:
    """Run a failed job again, from the steps that it completed; nothing is charged twice."""
    _run(session, job_id, partial(session.system().jobs.retry, reason=reason), as_json=as_json)


@jobs.command()
@click.option("--once", is_flag=True, help="Stop when no job waits; default: wait for more.")
@device_option
@json_option
@with_session
def work(session: Session, once: bool, as_json: bool) -> None:
    """Run the jobs that are queued or were interrupted, oldest first, until Ctrl-C.

    A job that another process runs is left to it; one that fails is reported, and the next begins.
    The exit status says whether one of them failed.
    """
    system = session.system()

    @contextmanager
    def watch(job_id: str) -> Iterator[OnStep]:
        if not as_json:
            click.echo(f"job {job_id}")
        with _progress(system, job_id, as_json=as_json) as progress:
            yield progress

    def report(left: dict[str, Any]) -> None:
        why = f": {left['error']}" if left["error"] else ""
        click.echo(f"job {left['id']} is {left['state']}{why}")

    done = system.jobs.work(once=once, watch=watch, report=None if as_json else report)
    failed = [left["id"] for left in done if left["state"] == "failed"]
    if as_json:
        print_json(done)
        if failed:  # the value on standard output names them
            click.get_current_context().exit(JobError.exit_status)
    elif failed:
        hint = f"llmos jobs show {failed[0]}"
        raise JobError(f"{len(failed)} of {len(done)} jobs failed", hint=hint)
    elif not done:
        click.echo("no job waits")


@jobs.command()
@click.argument("job_id")
@json_option
@with_session
def cancel(session: Session, job_id: str, as_json: bool) -> None:
    """Stop a job at its next step; only the steps that were run are charged."""
    state = session.system().jobs.cancel(job_id)
    if as_json:
        print_json({"id": job_id, "state": state})
        return
    click.echo(f"job {job_id} {'stops at its next step' if state == 'running' else f'is {state}'}")


def _run(session: Session, job_id: str, run: Callable[..., Any], *, as_json: bool) -> None:
    with _progress(session.system(), job_id, as_json=as_json) as progress:
        result = run(job_id, on_step=progress)
    if as_json:
        print_json(result)
        return
    click.echo(f"job {job_id} is done: model {result['model']}")


def _progress(system: System, job_id: str, *, as_json: bool) -> AbstractContextManager[OnStep]:
    from llmos.cli.progress import training_progress

    return training_progress(system.jobs.steps(job_id), quiet=as_json)
