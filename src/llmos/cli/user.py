"""`llmos user`: the people and programs of a home."""

from __future__ import annotations

import click

from llmos.cli.session import Session, json_option, print_json, print_table, with_session

ROLES = ("administrator", "steward", "engineer", "developer", "auditor")


@click.group()
def user() -> None:
    """Add and list the people and programs of this home."""


@user.command()
@click.argument("name")
@click.option("--role", "roles", multiple=True, required=True, type=click.Choice(ROLES))
@json_option
@with_session
def add(session: Session, name: str, roles: tuple[str, ...], as_json: bool) -> None:
    """Add a person or program with one or more roles."""
    principal = session.system().access.add_user(name, roles)
    if as_json:
        print_json({"name": principal.name, "roles": sorted(principal.roles)})
        return
    click.echo(f"{principal.name}: {', '.join(sorted(principal.roles))}")


@user.command("ls")
@json_option
@with_session
def list_(session: Session, as_json: bool) -> None:
    """List the people and programs."""
    principals = session.system().kernel.identity.principals()
    rows = [{"name": p.name, "roles": sorted(p.roles)} for p in principals]
    if as_json:
        print_json(rows)
        return
    print_table("users", ("name", "roles"), [(r["name"], ", ".join(r["roles"])) for r in rows])
