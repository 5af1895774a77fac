"""`llmos log`: show, verify, prove, export, inspect and witness the audit log."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmos.cli.session import Session, json_option, print_json, print_table, with_session
from llmos.errors import TamperedLog

if TYPE_CHECKING:
    from llmos.transparency.log_inspection import Inspection
    from llmos.workflows.partners import Partner


@click.group()
def log() -> None:
    """Show, verify and prove entries of the audit log."""


@log.command()
@click.option("--after", type=int, default=-1, help="Show entries after this index.")
@click.option("--limit", type=click.IntRange(min=1, max=10_000), default=50, show_default=True)
@json_option
@with_session
def show(session: Session, after: int, limit: int, as_json: bool) -> None:
    """Show entries of the log: who did what to what, when, and how it ended."""
    entries = session.system().log.read(after=after, limit=limit)
    if as_json:
        print_json([{"index": index, **entry} for index, entry in entries])
        return
    print_table(
        "entries",
        ("index", "at", "actor", "action", "resource", "outcome"),
        [
            (index, e["at"], e["actor"], e["action"], e["resource"], e["outcome"])
            for index, e in entries
        ],
    )


@log.command()
@json_option
@with_session
def verify(session: Session, as_json: bool) -> None:
    """Recompute the whole tree and compare it with the signed checkpoint."""
    size = session.system().log.verify()
    cosigned = session.system().log.cosigned()
    if as_json:
        lines = [asdict(cosignature) for cosignature in cosigned]
        print_json({"entries": size, "verified": True, "cosigned": lines})
        return
    click.echo(f"{size} entries agree with the tree and with the signed checkpoint")
    for cosignature in cosigned:
        click.echo(
            f"{cosignature.size} entries cosigned by {cosignature.partner}: {cosignature.at}"
        )


@log.command()
@click.argument("index", type=int)
@click.argument("path", type=click.Path(path_type=Path))
@json_option
@with_session
def prove(session: Session, index: int, path: Path, as_json: bool) -> None:
    """Write a proof that entry INDEX is in the log; `llmos verify` checks it offline."""
    session.system().log.prove(index, path)
    if as_json:
        print_json({"index": index, "proof": str(path)})
        return
    click.echo(f"{path}: proof of entry {index}")


@log.command()
@click.option(
    "--as",
    "form",
    type=click.Choice(["ocsf", "jsonl", "tiles"]),
    required=True,
    help="OCSF events, entries as JSON Lines, or C2SP tiles for static hosting.",
)
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
@with_session
def export(session: Session, form: str, folder: Path, as_json: bool) -> None:
    """Write the verified log and its checkpoint into a new FOLDER, whole or not at all."""
    size = session.system().log.export(form, folder)
    if as_json:
        print_json({"folder": str(folder), "format": form, "entries": size})
        return
    click.echo(f"{folder}: {size} entries as {form}")


@log.group()
def partner() -> None:
    """Add, list and remove the partners that witness this log and whose logs are witnessed."""


@partner.command()
@click.argument("name")
@click.argument("vkey")
@click.option("--url", help="Where the partner takes checkpoints, as https://HOST:PORT/witness.")
@json_option
@with_session
def add(session: Session, name: str, vkey: str, url: str | None, as_json: bool) -> None:
    """Add a partner by VKEY, the second line of its home.pub; get it on a way that you trust."""
    added = session.system().log.add_partner(name, vkey, url=url)
    if as_json:
        print_json(_partner_facts(added))
        return
    click.echo(f"{name}: {added.verifier.name}")


@partner.command("ls")
@json_option
@with_session
def list_(session: Session, as_json: bool) -> None:
    """List the partners."""
    rows = [_partner_facts(found) for found in session.system().log.partners()]
    if as_json:
        print_json(rows)
        return
    columns = ("name", "log", "url", "added_at")
    print_table("partners", columns, [[row[column] for column in columns] for row in rows])


@partner.command()
@click.argument("name")
@json_option
@with_session
def remove(session: Session, name: str, as_json: bool) -> None:
    """Remove a partner; what was witnessed of its log is kept."""
    session.system().log.remove_partner(name)
    if as_json:
        print_json({"removed": name})
        return
    click.echo(f"{name} is no partner any more")


def _partner_facts(found: Partner) -> dict[str, str | None]:
    return {
        "name": found.name,
        "log": found.verifier.name,
        "vkey": found.verifier.vkey,
        "url": found.url,
        "added_at": found.added_at,
    }


@log.command()
@json_option
@with_session
def cosign(session: Session, as_json: bool) -> None:
    """Send the newest checkpoint to every partner that has a URL and keep the cosignatures."""
    said = session.system().log.cosign()
    if said.refusals:
        for name in said.lines:
            click.echo(f"{said.size} entries cosigned by {name}", err=True)
        for name, error in list(said.refusals.items())[1:]:
            click.echo(f"{name}: {error.message}", err=True)
        raise next(iter(said.refusals.values()))
    if as_json:
        print_json({"entries": said.size, "cosigned_by": sorted(said.lines)})
        return
    click.echo(f"{said.size} entries cosigned by {', '.join(sorted(said.lines))}")


@log.command()
@json_option
@with_session
def inspect(session: Session, as_json: bool) -> None:
    """Say what differs in a log that was changed; for a home that refuses to start.

    Needs no key, and changes nothing: it reads a copy. Exit status 10 if anything differs.
    """
    from llmos.databases.postgresql import PostgreSQL
    from llmos.kernel import kernel
    from llmos.transparency import log_inspection

    config = session.config()
    place = kernel.locate(config, "kernel")
    server = place if isinstance(place, PostgreSQL) else None
    found = log_inspection.inspect(config.home, server)
    if as_json:
        print_json(asdict(found))
    else:
        _print_inspection(found)
    if found.differences:
        raise click.exceptions.Exit(TamperedLog.exit_status)


def _print_inspection(found: Inspection) -> None:
    for difference in found.differences:
        click.echo(f"  {difference}")
    if not found.signature_checked:
        click.echo("no signature was checked: home.pub is missing or damaged")
    if not found.differences:
        click.echo(f"{found.entries} entries, their hashes and the signed checkpoint agree")
    elif found.entries_as_signed:
        click.echo("every entry is as it was signed; what differs lies beside the entries")
