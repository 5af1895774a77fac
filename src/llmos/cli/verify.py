"""`llmos verify`: check a certificate or receipt with nothing but the public keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from llmos.cli.session import json_option, print_fields, print_json


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--key",
    "keys",
    type=click.Path(path_type=Path),
    help="The home's public keys; default: home.pub beside FILE.",
)
@click.option(
    "--site",
    "sites",
    multiple=True,
    metavar="NAME=FILE",
    help="A site's own home.pub, for the certificate of a federated model.",
)
@json_option
def verify(file: Path, keys: Path | None, sites: tuple[str, ...], as_json: bool) -> None:
    """Verify a certificate, an erasure receipt or a log proof offline.

    Signatures and log proofs are checked; a certificate's epsilon and sentences are derived again.
    """
    from llmos.system import verify as check

    verified = check(file, keys=keys, sites=_named(sites))
    if as_json:
        print_json(verified)
        return
    click.echo(f"{file}: verified")
    print_fields(_lines(verified))
    if keys is None:
        click.echo(
            "  note: home.pub was found beside the file; compare its fingerprint with one that "
            "the operator gave you by another way"
        )


def _named(sites: tuple[str, ...]) -> dict[str, Path]:
    """Read NAME=FILE."""
    pairs = [given.partition("=") for given in sites]
    if not all(name and path for name, _, path in pairs):
        raise click.UsageError("--site takes NAME=FILE, such as --site east=east.pub")
    return {name: Path(path) for name, _, path in pairs}


def _lines(fields: Mapping[str, object]) -> dict[str, object]:
    """Give each item of a list a line of its own."""
    lines: dict[str, object] = {}
    for name, value in fields.items():
        if isinstance(value, list):
            lines |= {f"{name} {number}": item for number, item in enumerate(value, start=1)}
        else:
            lines[name] = value
    return lines
