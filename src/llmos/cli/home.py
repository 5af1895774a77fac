"""`llmos init` and `llmos doctor`: make a home; check the machine and the home."""

from __future__ import annotations

import click

from llmos.cli.session import (
    Session,
    ask_new_passphrase,
    ask_secret,
    json_option,
    print_fields,
    print_json,
    with_session,
)


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
@click.option(
    "--pkcs11",
    "module",
    type=click.Path(),
    help="Wrap the root key in a hardware token that this PKCS#11 library reaches.",
)
@click.option("--token", help="The label of that token.")
@json_option
@with_session
def init(
    session: Session,
    use_passphrase: bool,
    key_file: str | None,
    module: str | None,
    token: str | None,
    as_json: bool,
) -> None:
    """Make a home: root key, signing keys, databases, policies, first administrator.

    Without options the root key lies in the home as root.key (mode 0600): whoever can read the
    home can open it. Use --key-file, --passphrase or --pkcs11 where that is not enough. The PIN of
    a token is asked for, or read from LLMOS_PKCS11_PIN_FILE.
    """
    from llmos.config import load
    from llmos.crypto.root_keys import Passphrase, RootKeyProvider
    from llmos.kernel import kernel, root

    if (module is None) != (token is None):
        raise click.UsageError("--pkcs11 and --token go together")
    if sum((use_passphrase, key_file is not None, module is not None)) > 1:
        raise click.UsageError("choose one of --passphrase, --key-file and --pkcs11")
    config = load(home=session.home, key_file=key_file, pkcs11_module=module)
    provider: RootKeyProvider | None = None
    kept = str(config.key_file or config.home / "root.key")
    if use_passphrase:
        provider = Passphrase(root.secret(config, "passphrase", ask_new_passphrase))
        kept = "passphrase"
    elif token is not None:
        provider = root.token(config, token, ask_secret)
        kept = f"token {token}; LLMOS_PKCS11_MODULE={config.pkcs11_module} opens it"
    made = kernel.create(config, provider=provider)
    facts = {
        "home": str(config.home),
        "administrator": config.principal,
        "public keys": str(config.home / "home.pub"),
        "root key": kept,
    }
    if as_json:
        print_json({**facts, "home_id": made.home_id})
        return
    click.echo("A new home:")
    print_fields(facts)
    click.echo("\nNext: llmos model pull smollm2-135m")


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
