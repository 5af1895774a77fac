"""`llmos key`: make, list and revoke API keys."""

from __future__ import annotations

import click

from llmos.cli.session import Session, json_option, print_json, print_table, with_session


@click.group()
def key() -> None:
    """Make, list and revoke API keys."""


@key.command()
@click.option("--user", help="Whose key; default: who the command line acts as.")
@click.option("--label", default="", help="What it is for.")
@click.option(
    "--model", "models", multiple=True, help="Models it may use; default: all of the user's."
)
@click.option("--days", type=click.IntRange(min=1), help="Days until it expires; default: never.")
@json_option
@with_session
def create(
    session: Session,
    user: str | None,
    label: str,
    models: tuple[str, ...],
    days: int | None,
    as_json: bool,
) -> None:
    """Make an API key and show it, once."""
    issued = session.system().access.create_key(user=user, label=label, models=models, days=days)
    if as_json:
        print_json({"id": issued.id, "token": issued.token})
        return
    click.echo(issued.token)
    click.echo("This is the only time it is shown; only a keyed hash is stored.", err=True)


@key.command("ls")
@json_option
@with_session
def list_(session: Session, as_json: bool) -> None:
    """List the API keys; never their secrets."""
    rows = session.system().access.keys()
    if as_json:
        print_json(rows)
        return
    print_table(
        "API keys",
        ("id", "user", "label", "models", "made", "expires", "revoked"),
        [
            (
                r["id"],
                r["principal"],
                r["label"],
                ", ".join(r["models"]),
                r["created_at"],
                r["expires_at"],
                r["revoked_at"],
            )
            for r in rows
        ],
    )


@key.command()
@click.argument("key_id")
@json_option
@with_session
def revoke(session: Session, key_id: str, as_json: bool) -> None:
    """Revoke an API key at once."""
    session.system().access.revoke_key(key_id)
    if as_json:
        print_json({"id": key_id, "state": "revoked"})
        return
    click.echo(f"key {key_id} is revoked")
