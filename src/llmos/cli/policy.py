"""`llmos policy`: show and check the access policies; ask what they decide."""

from __future__ import annotations

from pathlib import Path

import click

from llmos.cli.session import Session, json_option, print_json, with_session
from llmos.errors import HomeMissing


@click.group()
def policy() -> None:
    """Show, check and test the access policies."""


@policy.command()
@with_session
def show(session: Session) -> None:
    """Print the policies and their schema."""
    for path in sorted(_folder(session).iterdir()):
        click.echo(f"// {path}\n{path.read_text()}")


def _folder(session: Session) -> Path:
    home = session.config().home
    if not (home / "policy").is_dir():
        raise HomeMissing(f"there is no home at {home}", hint=f"llmos --home {home} init")
    return home / "policy"


@policy.command()
@json_option
@with_session
def check(session: Session, as_json: bool) -> None:
    """Validate the policies against their schema; an invalid set denies everything."""
    from llmos.kernel.policy import Policy

    folder = _folder(session)
    Policy.load(folder)
    if as_json:
        print_json({"folder": str(folder), "valid": True})
        return
    click.echo(f"{folder}: valid")


@policy.command()
@click.argument("user")
@click.argument("action")
@click.option("--data", "dataset", help="Ask about this dataset.")
@click.option("--model", help="Ask about this model.")
@click.option("--purpose", default="training", show_default=True)
@json_option
@with_session
def test(
    session: Session,
    user: str,
    action: str,
    dataset: str | None,
    model: str | None,
    purpose: str,
    as_json: bool,
) -> None:
    """Say whether USER may do ACTION, and which policies decide it; exit status 5 when not."""
    decision = session.system().access.test_policy(user, action, dataset, model, purpose)
    if as_json:
        print_json(decision)
    else:
        click.echo(f"{'allowed' if decision['allowed'] else 'denied'}: {decision['reason']}")
    if not decision["allowed"]:
        raise click.exceptions.Exit(5)
