"""`llmos measure`: leak reports of one or more models, side by side."""

from __future__ import annotations

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


@click.command()
@click.argument("models", nargs=-1, required=True)
@device_option
@json_option
@with_session
def measure(session: Session, models: tuple[str, ...], as_json: bool) -> None:
    """Measure what MODELS leak: extraction, membership, exposure, lower bound on epsilon.

    Exit status 14 when a measured lower bound lies above the epsilon in the ledger: then the
    implementation is broken and its certificate must not be trusted.
    """
    system = session.system()
    if as_json:
        result = system.measure(*models)
        print_json(result.to_dict())  # the verdicts are in it
        if any(report.failed for report in result.reports):
            raise click.exceptions.Exit(LeakFound.exit_status)
        return
    with console().status("measuring"):
        result = system.measure(*models)
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
    if "federated" in system.registry.model(models[-1]).card:
        click.echo(f"Next, at the coordinator: llmos report {models[-1]}")
    else:
        click.echo(f"Next: llmos report {models[-1]}")
