"""`llmos model`: pull, list, show and export models."""

from __future__ import annotations

from pathlib import Path

import click

from llmos.cli.session import (
    Session,
    console,
    json_option,
    print_fields,
    print_json,
    print_table,
    with_session,
)


@click.group()
def model() -> None:
    """Pull, list, show and export models."""


@model.command()
@click.argument("source")
@click.option("--name", help="Name in this home; default: derived from SOURCE.")
@json_option
@with_session
def pull(session: Session, source: str, name: str | None, as_json: bool) -> None:
    """Fetch a base model: smollm2-135m, a directory in Hugging Face format, or hf:ORG/NAME."""
    system = session.system()
    if as_json:
        print_json(system.pull(source, name=name).to_dict())
        return
    from rich.text import Text  # a plain string would be read as markup

    with console().status(Text(f"pulling {source}")):
        entry = system.pull(source, name=name)
    click.echo(f"Model {entry.name} is ready:")
    print_fields(
        {"source": entry.card["source"], "licence": entry.card["licence"], "sha256": entry.digest}
    )


@model.command("ls")
@json_option
@with_session
def list_(session: Session, as_json: bool) -> None:
    """List the models."""
    entries = session.system().registry.models()
    if as_json:
        print_json([entry.to_dict() for entry in entries])
        return
    print_table(
        "models",
        ("name", "kind", "base", "dataset", "epsilon", "made"),
        [
            (e.name, e.kind, e.base, e.card.get("dataset"), _epsilon(e.card), e.created_at)
            for e in entries
        ],
    )


def _epsilon(card: dict[str, object]) -> str | None:
    if "dataset" not in card:
        return None
    epsilon = card.get("epsilon")
    return "none: no privacy" if epsilon is None else f"{epsilon:.3f}"


@model.command()
@click.argument("name")
@json_option
@with_session
def show(session: Session, name: str, as_json: bool) -> None:
    """Show what is known about a model."""
    entry = session.system().registry.model(name).to_dict()
    if as_json:
        print_json(entry)
        return
    print_fields(entry)


@model.command()
@click.argument("name")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--reason", default="", help="Proposes an export that takes a second person.")
@json_option
@with_session
def export(session: Session, name: str, folder: Path, reason: str, as_json: bool) -> None:
    """Write a trained adapter to FOLDER in PEFT format, in the clear.

    What may hold data of people takes a second person: say why with --reason, let them approve,
    and run it again.
    """
    written = session.system().export(name, folder, reason=reason)
    if as_json:
        print_json({"folder": str(folder), "files": [path.name for path in written]})
        return
    click.echo(f"{folder} now holds {', '.join(path.name for path in written)}, unencrypted")
