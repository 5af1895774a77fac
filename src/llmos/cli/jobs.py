"""`llmos jobs`: list, show, resume and cancel jobs."""

from __future__ import annotations

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


@click.group()
def jobs() -> None:
    """List, show, resume and cancel jobs."""


@jobs.command("ls")
@json_option
@with_session
def list_(session: Session, as_json: bool) -> None:
    """List the jobs, newest first."""
    rows = session.system().job_overview()
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
    facts = session.system().job_facts(job_id)
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
    """Go on with a job that was killed, interrupted or failed; nothing is charged twice."""
    from llmos.cli.progress import training_progress

    system = session.system()
    with training_progress(system.job_steps(job_id), quiet=as_json) as progress:
        result = system.resume(job_id, on_step=progress)
    if as_json:
        print_json(result)
        return
    click.echo(f"job {job_id} is done: model {result['model']}")


@jobs.command()
@click.argument("job_id")
@json_option
@with_session
def cancel(session: Session, job_id: str, as_json: bool) -> None:
    """Stop a job at its next step; only the steps that were run are charged."""
    state = session.system().cancel(job_id)
    if as_json:
        print_json({"id": job_id, "state": state})
        return
    click.echo(f"job {job_id} {'stops at its next step' if state == 'running' else f'is {state}'}")
