"""`llmos approval`: acts that take two people; see and decide what someone else proposed."""

from __future__ import annotations

import click

from llmos.cli.session import (
    Session,
    json_option,
    print_fields,
    print_json,
    print_table,
    with_session,
)


@click.group()
def approval() -> None:
    """List, show and decide what was proposed. Decide as another person than the proposer.

    LLMOS_API_KEY_FILE names a file with an API key of the person who decides.
    """


@approval.command("ls")
@json_option
@with_session
def list_(session: Session, as_json: bool) -> None:
    """List all proposals, oldest first."""
    found = session.system().approvals.overview()
    if as_json:
        print_json(found)
        return
    print_table(
        "approvals",
        ("approval", "act", "subject", "proposer", "reason", "state", "decider"),
        [
            (a["id"], a["act"], a["subject"], a["proposer"], a["reason"], a["state"], a["decider"])
            for a in found
        ],
    )


@approval.command()
@click.argument("approval_id")
@json_option
@with_session
def show(session: Session, approval_id: str, as_json: bool) -> None:
    """Show one proposal; --json has the signed record of its decision."""
    found = session.system().approvals.facts(approval_id)
    if as_json:
        print_json(found)
        return
    print_fields({name: value for name, value in found.items() if name != "record"})


@approval.command()
@click.argument("approval_id")
@json_option
@with_session
def approve(session: Session, approval_id: str, as_json: bool) -> None:
    """Approve a proposal: it is done at once."""
    _decide(session, approval_id, approve=True, as_json=as_json)


@approval.command()
@click.argument("approval_id")
@json_option
@with_session
def refuse(session: Session, approval_id: str, as_json: bool) -> None:
    """Refuse a proposal."""
    _decide(session, approval_id, approve=False, as_json=as_json)


def _decide(session: Session, approval_id: str, *, approve: bool, as_json: bool) -> None:
    decided = session.system().approvals.decide(approval_id, approve=approve)
    if as_json:
        print_json(decided)
        return
    click.echo(f"{approval_id} is {decided['state']}: {decided['act']} of {decided['subject']}")
    if decided.get("receipt"):
        click.echo(f"Signed receipt: {decided['receipt']}")
