"""`llmos site`: take part in federated trainings, and decide in which."""

from __future__ import annotations

import threading
from typing import Any

import click

from llmos.cli.session import (
    Session,
    device_option,
    json_option,
    print_fields,
    print_json,
    print_table,
    say,
    with_session,
)


@click.group()
def site() -> None:
    """Take part in federated trainings; what runs here is decided here."""


@site.command()
@click.argument("url")
@click.option("--token", help="The join token; --token-file keeps it from other users' eyes.")
@click.option("--token-file", type=click.File("r"), help="File with the token; - reads it.")
@click.option("--once", is_flag=True, help="Join and stop; `llmos site up` takes part later.")
@device_option
@json_option
@with_session
def join(
    session: Session,
    url: str,
    token: str | None,
    token_file: Any,  # noqa: ANN401
    once: bool,
    as_json: bool,
) -> None:
    """Join the federation at URL by a token, once, and take part until Ctrl-C."""
    if token is None and token_file is None:
        token = click.prompt("Token", hide_input=True)
    facts = session.system().parties.join(url, token or token_file.readline())
    if as_json:
        print_json(facts)
    else:
        click.echo(f"{facts['id']} until {facts['expires_at']}")
    if not once:
        _take_part(session, str(facts["organisation"]))


@site.command()
@click.argument("organisation", required=False)
@device_option
@with_session
def up(session: Session, organisation: str | None) -> None:
    """Take part in the federation of ORGANISATION, or of the only one joined, until Ctrl-C."""
    from llmos.errors import ConfigError

    joined = [one["organisation"] for one in session.system().parties.memberships()]
    if organisation is None:
        if len(joined) != 1:
            raise ConfigError(
                f"this home has joined {len(joined)} federations: say which one",
                hint=", ".join(joined) or "llmos site join URL --token-file FILE",
            )
        organisation = joined[0]
    _take_part(session, organisation)


@site.command("jobs")
@json_option
@with_session
def jobs(session: Session, as_json: bool) -> None:
    """List the jobs that this site was asked for."""
    rows = session.system().federation.invitations()
    if as_json:
        print_json(rows)
        return
    print_table(
        "federated jobs",
        ("id", "state", "dataset", "method", "rounds", "epsilon at most", "sites"),
        [
            (
                row["id"],
                row["state"],
                row["manifest"]["dataset"],
                row["manifest"]["adapter"]["parametrisation"],
                row["manifest"]["rounds"],
                (row["manifest"]["privacy"] or {}).get("epsilon"),
                len(row["manifest"]["sites"]),
            )
            for row in rows
        ],
    )


@site.command()
@click.argument("job_id")
@json_option
@with_session
def show(session: Session, job_id: str, as_json: bool) -> None:
    """Show all that a job asks of this site."""
    _print(session.system().federation.invitation(job_id), as_json=as_json)


@site.command()
@click.argument("job_id")
@json_option
@with_session
def approve(session: Session, job_id: str, as_json: bool) -> None:
    """Approve exactly this job; its epsilon is reserved before anything is opened."""
    _decided(session.system().federation.approve(job_id), as_json=as_json)


@site.command()
@click.argument("job_id")
@click.option("--reason", required=True, help="Kept in the audit log, and told to the coordinator.")
@json_option
@with_session
def refuse(session: Session, job_id: str, reason: str, as_json: bool) -> None:
    """Refuse a job before it runs."""
    _decided(session.system().federation.refuse(job_id, reason=reason), as_json=as_json)


@site.command()
@click.argument("job_id")
@click.option("--reason", required=True, help="Kept in the audit log, and told to the coordinator.")
@json_option
@with_session
def withdraw(session: Session, job_id: str, reason: str, as_json: bool) -> None:
    """Stop taking part in a running job; what was run stays charged."""
    _decided(session.system().federation.withdraw(job_id, reason=reason), as_json=as_json)


def _take_part(session: Session, organisation: str) -> None:
    from llmos.workflows.ctrl_c import stopped_by_ctrl_c

    stop = threading.Event()
    with stopped_by_ctrl_c(stop):
        session.system().federation.take_part(organisation, tell=say, stop=stop)


def _decided(facts: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(facts)
        return
    click.echo(f"{facts['id']} is {facts['state']}")


def _print(facts: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(facts)
        return
    manifest = facts.pop("manifest")
    print_fields({name: value for name, value in facts.items() if value is not None} | manifest)
