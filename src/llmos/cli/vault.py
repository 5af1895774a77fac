"""`llmos vault`: show and rotate the vault's keys; change how the root key is kept; sweep."""

from __future__ import annotations

from datetime import timedelta
from functools import cache

import click

from llmos.cli.session import (
    Session,
    ask_new_passphrase,
    ask_secret,
    json_option,
    print_fields,
    print_json,
    print_table,
    with_session,
)


@click.group()
def vault() -> None:
    """Show and rotate the vault's keys; change how the root key is kept; sweep."""


@vault.command()
@json_option
@with_session
def show(session: Session, as_json: bool) -> None:
    """List the versions of each tenant's key and how many objects each opens."""
    rows = session.system().vault.versions()
    if as_json:
        print_json(rows)
        return
    names = ("tenant", "version", "objects", "created_at", "retired_at")
    print_table(
        "tenant keys",
        ("tenant", "version", "objects", "made", "retired"),
        [[row[name] for name in names] for row in rows],
    )


@vault.command()
@json_option
@with_session
def rotate(session: Session, as_json: bool) -> None:
    """Make a new tenant key, wrap every object's key under it and destroy the old one.

    Objects are not encrypted anew. After a crash run it again: it goes on where it was.
    """
    done = session.system().vault.rotate()
    if as_json:
        print_json(done)
        return
    click.echo(
        f"tenant key version {done['version']}: {done['rewrapped']} keys wrapped and "
        f"verified, {done['retired']} older versions destroyed"
    )


@vault.command()
@click.option("--older-than", type=float, default=24.0, show_default=True, help="Hours; 1 or more.")
@json_option
@with_session
def sweep(session: Session, older_than: float, as_json: bool) -> None:
    """Remove what crashes left behind: objects that nothing names, and files without a key.

    Not after kernel.db was restored from a backup: what it does not know of yet would go for good.
    """
    removed = session.system().vault.sweep(older_than=timedelta(hours=older_than))
    if as_json:
        print_json(removed)
        return
    click.echo(
        f"removed: {removed['objects']} objects that nothing named, "
        f"{removed['files']} files without a key"
    )


@vault.command()
@click.option(
    "--to",
    "provider",
    type=click.Choice(["passphrase", "key-file", "pkcs11"]),
    required=True,
    help="What keeps the root key from now on.",
)
@click.option("--key-file", type=click.Path(), help="The new key file; default: in the home.")
@click.option(
    "--passphrase-file",
    type=click.Path(),
    help="File whose first line is the new passphrase; default: it is asked for.",
)
@click.option("--token", help="Label of the hardware token; its library is LLMOS_PKCS11_MODULE.")
@json_option
@with_session
def rekey(
    session: Session,
    provider: str,
    key_file: str | None,
    passphrase_file: str | None,
    token: str | None,
    as_json: bool,
) -> None:
    """Change how the root key is kept; the root key and all that it opens stay.

    The home opens the old way until the new one was tried. A key file in the home is then removed;
    one elsewhere and keys in tokens are left to you. Backups of the home still open the old way.
    """
    from llmos.config import load
    from llmos.crypto.root_keys import KeyFile, Passphrase, RootKeyProvider
    from llmos.kernel import root

    if provider == "pkcs11" and token is None:
        raise click.UsageError("--to pkcs11 needs --token LABEL")
    ask = cache(ask_secret)  # once, although the home is opened and then its root key
    system = session.system(ask)
    config = load(home=session.home, key_file=key_file, passphrase_file=passphrase_file)
    new: RootKeyProvider
    if provider == "passphrase":
        if passphrase_file is None:
            new = Passphrase(ask_new_passphrase())
        else:
            unset = config.model_copy(update={"passphrase": None})
            new = Passphrase(root.secret(unset, "passphrase", None))
    elif provider == "key-file":
        new = root.key_file(config)
    else:
        new = root.token(config, str(token), ask_secret)
    system.vault.rekey(new, ask=ask)
    facts = {"home": str(config.home), "root key": provider}
    if isinstance(new, KeyFile):
        facts["key file"] = str(new.path)
    if as_json:
        print_json(facts)
        return
    print_fields(facts)
