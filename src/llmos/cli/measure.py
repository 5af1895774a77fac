"""`llmos measure`: leak reports of one or more models, side by side."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import click

from llmos.cli.session import (
    Session,
    console,
    device_option,
    json_option,
    print_json,
    print_table,
    with_session,
)
from llmos.errors import LeakFound

if TYPE_CHECKING:
    from llmos.workflows.invert import Inverted


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option(
    "--inversion",
    is_flag=True,
    help="Attack what this site has sent in a federated job, instead of the model.",
)
@click.option(
    "--records",
    type=click.IntRange(min=20),
    default=200,
    show_default=True,
    help="Compare so many members and held-out records at most: fewer are faster, and say less.",
)
@device_option
@json_option
@with_session
def measure(
    session: Session, models: tuple[str, ...], inversion: bool, records: int, as_json: bool
) -> None:
    """Measure what MODELS leak: extraction, membership, exposure, lower bound on epsilon.

    Exit status 14 when a measured lower bound lies above the epsilon in the ledger, or when the
    masks of a federated job do not hide what they should: then the implementation is broken and its
    certificate must not be trusted.
    """
    if inversion:
        _invert(session, models, as_json=as_json)
    else:
        _measure(session, models, records, as_json=as_json)


def _measure(session: Session, models: tuple[str, ...], records: int, *, as_json: bool) -> None:
    system = session.system()
    if as_json:
        result = system.measure(*models, records=records)
        print_json(result.to_dict())  # the verdicts are in it
        if any(report.failed for report in result.reports):
            raise click.exceptions.Exit(LeakFound.exit_status)
        return
    with console().status("measuring"):
        result = system.measure(*models, records=records)
    print_table("measurements", ("", "chance", *models), result.rows())
    click.echo(f"plot: {result.plot}")
    for report in result.reports:
        if report.failed and report.bound is not None:
            click.secho("FAIL", fg="red", bold=True)
            raise LeakFound(
                f"{report.model} leaks at least epsilon {report.bound.lower:.2f} "
                f"({report.bound.confidence:.0%} confidence), "
                f"but the ledger promises {report.epsilon_ledger:.2f}",
                hint="do not release this model; the training code or its accounting is broken",
            )
    federated = "federated" in system.registry.model(models[-1]).card
    what = " makes a page here, and at the coordinator the certificate" if federated else ""
    click.echo(f"Next: llmos report {models[-1]}{what}")


def _invert(session: Session, models: tuple[str, ...], *, as_json: bool) -> None:
    system = session.system()
    with nullcontext() if as_json else console().status("attacking"):
        found = [system.measure_inversion(model) for model in models]
    broken = [one.report.model for one in found if one.report.failed]
    if as_json:
        print_json({"inversion": [one.to_dict() for one in found]})
        if broken:
            raise click.exceptions.Exit(LeakFound.exit_status)
        return
    for one in found:
        _show(one)
    if broken:
        click.secho("FAIL", fg="red", bold=True)
        raise LeakFound(
            f"the masks of this site do not hide what is behind them ({', '.join(broken)})",
            hint="stop this site (Ctrl-C); secure aggregation or its random numbers are broken",
        )


def _show(one: Inverted) -> None:
    """Print what gradient inversion recovers from what could be seen of single records."""
    from llmos.reports.inversions import COLUMNS

    shown = one.shown
    print_table(f"tokens of records of {one.report.model}", COLUMNS, shown.rows)
    for statement in shown.statements:
        click.echo(statement)
    click.echo(f"verdict on the masks: {shown.verdict}: {shown.meaning}")
    click.echo(f"report: {one.file}")
