"""`llmos verify`: check a certificate with nothing but the public keys."""

from __future__ import annotations

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
@json_option
def verify(file: Path, keys: Path | None, as_json: bool) -> None:
    """Verify a certificate offline: signature, log entries, epsilon and every sentence."""
    from llmos.system import verify as check

    verified = check(file, keys=keys)
    if as_json:
        print_json(verified)
        return
    click.echo(f"{file}: verified")
    print_fields(verified)
    if keys is None:
        click.echo(
            "  note: home.pub was found beside the file; compare its fingerprint with one that "
            "the operator gave you by another way"
        )
