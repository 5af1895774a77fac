"""`llmos key`: make, list, rotate and revoke API keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from llmos.cli.session import Session, json_option, print_json, print_table, with_session

if TYPE_CHECKING:
    from llmos.kernel.identity import IssuedKey


@click.group()
def key() -> None:
    """Make, list, rotate and revoke API keys."""


@key.command()
@click.option("--user", help="Whose key; default: who the command line acts as.")
@click.option("--label", default="", help="What it is for.")
@click.option(
    "--model", "models", multiple=True, help="Models it may use; default: all of the user's."
)
@click.option("--action", "actions", multiple=True, help="Actions it may ask for; default: all.")
@click.option("--purpose", help="The one purpose that it may serve; default: any.")
@click.option("--days", type=click.IntRange(min=1), help="Days until it expires; default: never.")
@json_option
@with_session
def create(
    session: Session,
    user: str | None,
    label: str,
    models: tuple[str, ...],
    actions: tuple[str, ...],
    purpose: str | None,
    days: int | None,
    as_json: bool,
) -> None:
    """Make an API key and show it, once. It can never do more than its user."""
    issued = session.system().access.create_key(
        user=user, label=label, models=models, actions=actions, purpose=purpose, days=days
    )
    _show(issued, as_json=as_json)


def _show(issued: IssuedKey, *, as_json: bool) -> None:
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
        ("id", "user", "label", "covers", "made", "expires", "revoked", "last used"),
        [
            (
                r["id"],
                r["principal"],
                r["label"],
                _covers(r),
                r["created_at"],
                r["expires_at"],
                r["revoked_at"],
                r["last_used_at"],
            )
            for r in rows
        ],
    )


def _covers(row: Mapping[str, Any]) -> str:
    """Say what a key is narrowed to."""
    named = {"models": row["models"], "actions": row["actions"]}
    narrowed = [", ".join(names) for names in named.values() if names != ["*"]]
    narrowed += [f"for {row['purpose']}"] if row["purpose"] is not None else []
    return "; ".join(narrowed) or "*"


@key.command()
@click.argument("key_id")
@click.option(
    "--overlap",
    type=click.FloatRange(min=0),
    default=24.0,
    show_default=True,
    help="Hours that the old key still works.",
)
@json_option
@with_session
def rotate(session: Session, key_id: str, overlap: float, as_json: bool) -> None:
    """Make a key with the same rights and show it, once; the old one ends after the overlap."""
    from datetime import timedelta

    issued = session.system().access.rotate_key(key_id, overlap=timedelta(hours=overlap))
    _show(issued, as_json=as_json)


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
