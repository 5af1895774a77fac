"""`llmos init` and `llmos doctor`: make a home; check the machine and the home."""

from __future__ import annotations

import click

from llmos.cli.session import Session, json_option, print_fields, print_json, with_session
from llmos.errors import ConfigError


@click.command()
@click.option(
    "--passphrase",
    "use_passphrase",
    is_flag=True,
    help="Protect the root key with a passphrase (asked for, or LLMOS_PASSPHRASE_FILE).",
)
@click.option(
    "--key-file", type=click.Path(), help="Keep the root key in this file, outside the home."
)
@json_option
@with_session
def init(session: Session, use_passphrase: bool, key_file: str | None, as_json: bool) -> None:
    """Make a home: root key, signing keys, databases, policies, first administrator.

    Without options the root key lies in the home as root.key (mode 0600): whoever can read the
    home can open it. Use --key-file or --passphrase where that is not enough.
    """
    from llmos.config import load
    from llmos.kernel import kernel

    config = load(home=session.home, key_file=key_file)
    passphrase = _new_passphrase(session) if use_passphrase else None
    made = kernel.create(config, passphrase=passphrase)
    facts = {
        "home": str(config.home),
        "administrator": config.principal,
        "public keys": str(config.home / "home.pub"),
        "root key": "passphrase" if use_passphrase else str(key_file or config.home / "root.key"),
    }
    if as_json:
        print_json({**facts, "home_id": made.home_id})
        return
    click.echo("A new home:")
    print_fields(facts)
    click.echo("\nNext: llmos model pull smollm2-135m")


def _new_passphrase(session: Session) -> str:
    config = session.config()
    if config.passphrase is not None:
        return config.passphrase.get_secret_value()
    if config.passphrase_file is not None:
        try:
            return config.passphrase_file.read_text().splitlines()[0]
        except (OSError, ValueError, IndexError) as error:
            raise ConfigError(f"{config.passphrase_file} holds no passphrase") from error
    return str(click.prompt("New passphrase", hide_input=True, confirmation_prompt=True))


@click.command()
@json_option
@with_session
def doctor(session: Session, as_json: bool) -> None:
    """Check this machine and this home; exit status 0 when all is well."""
    from llmos.workflows import doctor as checks

    findings = checks.run(session.config())
    if as_json:
        print_json([finding.to_dict() for finding in findings])
    else:
        for finding in findings:
            click.echo(f"  {'ok ' if finding.ok else 'BAD'}  {finding.name}: {finding.detail}")
    if not all(finding.ok for finding in findings):
        raise click.exceptions.Exit(1)
