"""`llmos report`: a signed certificate and an HTML page for a model."""

from __future__ import annotations

from pathlib import Path

import click

from llmos.cli.session import Session, json_option, print_fields, print_json, with_session


@click.command()
@click.argument("model")
@click.option("--compare", multiple=True, help="Another measured model to show beside it.")
@click.option("--folder", type=click.Path(path_type=Path), help="Default: reports in the home.")
@json_option
@with_session
def report(
    session: Session, model: str, compare: tuple[str, ...], folder: Path | None, as_json: bool
) -> None:
    """Write MODEL's privacy certificate (signed, logged) and one HTML page."""
    files = session.system().report(model, compare=compare, folder=folder)
    if as_json:
        print_json(files.to_dict())
        return
    if files.certificate is None:
        click.echo(f"{model} has no guarantee, so it gets a report and no certificate:")
        print_fields({"page": files.page})
        return
    click.echo(f"Certificate of {model}:")
    print_fields(files.to_dict())
    click.echo(f"\nNext: llmos verify {files.certificate} --key {files.public_keys}")
