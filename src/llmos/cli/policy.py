"""`llmos policy`: show, check, ask, explain and change what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from llmos.cli.session import Session, json_option, print_json, with_session
from llmos.errors import HomeMissing


@click.group()
def policy() -> None:
    """Show, check, test, explain and change the access policies.

    The files in the home's folder `policy` are drafts: they are in force when someone has proposed
    them with `apply` and another person has approved.
    """


@policy.command()
@json_option
@with_session
def show(session: Session, as_json: bool) -> None:
    """Print the policies in force."""
    found = session.system().policies.in_force()
    if as_json:
        print_json({"digest": found.digest, "files": dict(found.files)})
        return
    click.echo(f"// in force: {found.digest}")
    for name, text in found.files.items():
        click.echo(f"// {name}\n{text}")


@policy.command()
def schema() -> None:
    """Print what policies may speak of."""
    from llmos.kernel.policy import DEFAULTS, SCHEMA_FILE

    click.echo((DEFAULTS / SCHEMA_FILE).read_text())


@policy.command()
@click.argument("place", type=click.Path(path_type=Path, exists=True), required=False)
@json_option
@with_session
def check(session: Session, place: Path | None, as_json: bool) -> None:
    """Check a file, or the *.cedar files of a folder, against the schema; default: the drafts."""
    from llmos.workflows import policy_text

    config = session.config()
    if place is None and not (config.home / "policy").is_dir():
        raise HomeMissing(f"there is no home at {config.home}", hint="llmos init makes one")
    found = policy_text.check(place or config.home / "policy")
    facts = {"place": str(place or config.home / "policy"), "digest": found.digest, "valid": True}
    if place is None:
        facts["in_force"] = session.system().policies.in_force().digest == found.digest
    if as_json:
        print_json(facts)
        return
    click.echo(f"{facts['place']}: valid")
    if not facts.get("in_force", True):
        click.echo("not in force: `llmos policy apply --reason TEXT` proposes it", err=True)


def _question(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the arguments and options of a question to the policies."""
    for decorate in (
        with_session,
        json_option,
        click.option("--purpose", help="For this purpose; of data by default training."),
        click.option("--model", help="Ask about this model."),
        click.option("--data", "dataset", help="Ask about this dataset."),
        click.argument("action"),
        click.argument("user"),
    ):
        function = decorate(function)
    return function


@policy.command()
@_question
def test(session: Session, user: str, action: str, as_json: bool, **about: str | None) -> None:
    """Say whether USER may do ACTION, and which policies decide it; exit status 5 when not."""
    decision = session.system().policies.test(user, action, **about)
    if as_json:
        print_json(decision)
    else:
        click.echo(f"{'allowed' if decision['allowed'] else 'denied'}: {decision['reason']}")
    if not decision["allowed"]:
        raise click.exceptions.Exit(5)


@policy.command()
@_question
def explain(session: Session, user: str, action: str, as_json: bool, **about: str | None) -> None:
    """Print the policies that decide whether USER may do ACTION, and what would change it."""
    found = session.system().policies.explain(user, action, **about)
    if as_json:
        print_json(found.to_dict())
        return
    click.echo(f"{'allowed' if found.allowed else 'denied'}: {found.reason}")
    for decided in found.policies:
        click.echo(f"\n// {decided['file']}, line {decided['line']}\n{decided['text']}")
    if found.would_allow:
        click.echo("\nAny one of these would allow it:")
        for change in found.would_allow:
            click.echo(f"  {change}")
    elif not found.allowed:
        click.echo(
            "\nNo other role, purpose or approval would allow it: the policies would have to."
        )


@policy.command("apply")
@click.argument(
    "folder", type=click.Path(path_type=Path, exists=True, file_okay=False), required=False
)
@click.option("--reason", required=True, help="Why; the other person reads it.")
@json_option
@with_session
def apply_(session: Session, folder: Path | None, reason: str, as_json: bool) -> None:
    """Propose the *.cedar files of FOLDER, by default the home's drafts, as the new policies."""
    from dataclasses import asdict

    asked = session.system().policies.propose(folder, reason=reason)
    if as_json:
        print_json(asdict(asked))
        return
    click.echo(f"{asked.id}: another person puts it in force: llmos approval approve {asked.id}")
    click.echo("Running processes keep their policies: restart `llmos serve` afterwards.", err=True)
