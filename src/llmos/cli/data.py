"""`llmos data`: import, list and show datasets, and erase people from them."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, Final

import click

from llmos.cli.session import (
    Session,
    json_option,
    print_fields,
    print_json,
    print_table,
    with_session,
)

_LONGEST_UNIT_FILE: Final = 1 << 20


@click.group()
def data() -> None:
    """Import, list and show datasets, and erase people from them."""


@data.command("import")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--name", help="Name of the dataset; default: the file's name.")
@click.option("--unit", required=True, help="Column that names the protected person.")
@click.option("--text", "text_column", help="Column with the text (one text per record).")
@click.option("--prompt", "prompt_column", help="Column with the prompt; needs --completion.")
@click.option("--completion", "completion_column", help="Column with the completion to learn.")
@click.option(
    "--classification",
    type=click.Choice(["public", "synthetic", "sensitive"]),
    default="sensitive",
    show_default=True,
    help="sensitive data can never train a model without privacy.",
)
@click.option("--purpose", "purposes", multiple=True, default=("training",), show_default=True)
@click.option("--epsilon", type=float, required=True, help="Total privacy budget per unit.")
@click.option("--delta", type=float, required=True, help="Probability of the guarantee failing.")
@click.option(
    "--purpose-epsilon",
    "parts",
    multiple=True,
    metavar="PURPOSE=EPSILON",
    help="Part of the budget that jobs for this purpose may use; repeatable.",
)
@click.option(
    "--tenant-epsilon",
    "tenant_parts",
    multiple=True,
    metavar="TENANT[/PURPOSE]=EPSILON",
    help="Part of the budget that jobs of this tenant's people may use; repeatable.",
)
@click.option(
    "--derived-from",
    "parents",
    multiple=True,
    metavar="DATASET",
    help="Dataset of the same people that this one was made from: jobs are charged there too.",
)
@click.option(
    "--holdout", type=float, default=0.1, show_default=True, help="Share of units kept out."
)
@click.option(
    "--canaries", type=int, default=0, show_default=True, help="Secrets to plant by fair coins."
)
@json_option
@with_session
def import_(
    session: Session,
    path: Path,
    name: str | None,
    unit: str,
    text_column: str | None,
    prompt_column: str | None,
    completion_column: str | None,
    classification: str,
    purposes: tuple[str, ...],
    epsilon: float,
    delta: float,
    parts: tuple[str, ...],
    tenant_parts: tuple[str, ...],
    parents: tuple[str, ...],
    holdout: float,
    canaries: int,
    as_json: bool,
) -> None:
    """Import PATH (.jsonl, .csv or .parquet) as an encrypted dataset with a privacy budget."""
    card = session.system().import_data(
        path,
        name=name,
        unit=unit,
        text=text_column,
        prompt=prompt_column,
        completion=completion_column,
        classification=classification,
        purposes=purposes,
        epsilon=epsilon,
        delta=delta,
        holdout=holdout,
        canaries=canaries,
        purpose_epsilons=dict(_part(text, "--purpose-epsilon") for text in parts),
        tenant_epsilons=dict(_part(text, "--tenant-epsilon") for text in tenant_parts),
        derived_from=parents,
    )
    if as_json:
        print_json(card.to_dict())
        return
    click.echo(f"Dataset {card.name} is stored encrypted:")
    print_fields(
        {
            "records": f"{card.records} of {card.units} {card.unit_column}s for training, "
            f"{card.holdout_records} of {card.holdout_units} held out",
            "classification": card.classification,
            "budget": f"epsilon {epsilon:g} at delta {delta:g}, per {card.unit_column}",
            "canaries": f"{card.canaries}; commitment {card.canary_commitment[:16]}... is logged"
            if card.canaries
            else "none",
            "fingerprint": card.fingerprint[:32],
        }
    )


def _part(text: str, option: str) -> tuple[str, float]:
    """Read NAME=EPSILON."""
    name, _, epsilon = text.partition("=")
    try:
        return name, float(epsilon)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not NAME=EPSILON", param_hint=option) from error


@data.command()
@click.argument("name")
@click.option("--blocks", type=int, required=True, help="How many; each person falls into one.")
@json_option
@with_session
def split(session: Session, name: str, blocks: int, as_json: bool) -> None:
    """Split NAME into datasets NAME-1, NAME-2, ... that share no person.

    What jobs on two of them cost does not add up, because nobody is in both: each block has the
    whole budget. A job on NAME is charged to every block. Only before the first job on NAME.
    """
    cards = session.system().data.split(name, blocks=blocks)
    if as_json:
        print_json([card.to_dict() for card in cards])
        return
    counts = [(c.name, c.units, c.records, c.holdout_units, c.canaries) for c in cards]
    print_table("blocks", ("name", "units", "records", "held-out units", "canaries"), counts)
    click.echo(f"Each has the budget of {name}: llmos budget ls")


@data.command("ls")
@json_option
@with_session
def list_(session: Session, as_json: bool) -> None:
    """List the datasets."""
    cards = session.system().datasets.cards()
    if as_json:
        print_json([card.to_dict() for card in cards])
        return
    print_table(
        "datasets",
        ("name", "classification", "unit", "units", "records", "held out", "canaries"),
        [
            (
                c.name,
                c.classification,
                c.unit_column,
                c.units,
                c.records,
                c.holdout_records,
                c.canaries,
            )
            for c in cards
        ],
    )


@data.command()
@click.argument("name")
@json_option
@with_session
def show(session: Session, name: str, as_json: bool) -> None:
    """Show what is known about a dataset; never its content."""
    card = session.system().datasets.card(name).to_dict()
    if as_json:
        print_json(card)
        return
    print_fields(card)


@data.command()
@click.argument("datasets", nargs=-1, metavar="[DATASET]...")
@click.option("--unit", help="The person; others on this machine can read it while this runs.")
@click.option(
    "--unit-file",
    type=click.File("rb"),
    help="File that names the person and nothing else; - is the standard input.",
)
@click.option("--column", help="Only datasets whose unit column has this name.")
@click.option("--reason", required=True, help="Kept in the log for ever; may not name the person.")
@json_option
@with_session
def erase(
    session: Session,
    datasets: tuple[str, ...],
    unit: str | None,
    unit_file: BinaryIO | None,
    column: str | None,
    reason: str,
    as_json: bool,
) -> None:
    """Propose to erase a person; another person's approval does it.

    Without DATASET from every dataset that holds this value of the unit column. Their keys are
    destroyed, so the records can never be read again. Models that were trained on them are not
    untrained: the signed receipt says what bounds what remains.
    """
    if (unit is None) == (unit_file is None):
        raise click.UsageError("name the person with either --unit-file or --unit")
    named = unit if unit_file is None else _one_line(unit_file)
    asked = session.system().data.erase(str(named), reason=reason, datasets=datasets, column=column)
    if as_json:
        print_json(asked)
        return
    click.echo(f"{asked['id']}: {asked['subject']}; nothing is erased yet.")
    click.echo(f"Another person decides: llmos approval approve {asked['id']}")


def _one_line(file: BinaryIO) -> str:
    """Return the only line of a file that has text."""
    from llmos.errors import DataError

    try:
        lines = [
            line for line in file.read(_LONGEST_UNIT_FILE).decode().splitlines() if line.strip()
        ]
    except UnicodeDecodeError as error:
        raise DataError("the file that names the person is not UTF-8 text") from error
    if len(lines) != 1:
        raise DataError(
            f"the file names {len(lines)} people; it must name one",
            hint="one person, one erasure, one receipt",
        )
    return lines[0]


@data.command()
@click.argument("approval_id")
@click.option("--out", type=click.Path(path_type=Path), help="Folder; default: the home's reports.")
@json_option
@with_session
def receipt(session: Session, approval_id: str, out: Path | None, as_json: bool) -> None:
    """Write the signed receipt of an erasure, and the public keys that verify it."""
    file, public_keys = session.system().data.receipt(approval_id, out)
    facts = {"receipt": str(file), "public keys": str(public_keys)}
    if as_json:
        print_json(facts)
        return
    print_fields(facts)
    click.echo(f"Verify it anywhere: llmos verify {file}")
