"""`llmos budget`: what each dataset may still pay for, and why."""

from __future__ import annotations

import click

from llmos.cli.session import Session, json_option, print_json, print_table, with_session


@click.group()
def budget() -> None:
    """List, show and explain privacy budgets."""


@budget.command("ls")
@json_option
@with_session
def list_(session: Session, as_json: bool) -> None:
    """List the pools: one per dataset and privacy unit."""
    ledger = session.system().kernel.budget
    pools = [ledger.explain(pool.dataset) for pool in ledger.pools()]
    if as_json:
        print_json(pools)
        return
    print_table(
        "budgets",
        ("dataset", "unit", "epsilon", "delta", "spent", "held", "remaining"),
        [
            (
                p["dataset"],
                p["unit"],
                f"{p['epsilon']:g}",
                f"{p['delta']:g}",
                f"{p['spent_share']:.1%}",
                f"{p['held_share']:.1%}",
                f"{p['remaining_share']:.1%}",
            )
            for p in pools
        ],
    )


@budget.command()
@click.argument("dataset")
@json_option
@with_session
def show(session: Session, dataset: str, as_json: bool) -> None:
    """Show the reservations of a dataset's pool, and check the balance against its events."""
    ledger = session.system().kernel.budget
    pool, recomputed = ledger.pool(dataset), ledger.recompute(dataset)
    agrees = recomputed == (pool.spent, pool.held)
    reservations = ledger.reservations(dataset)
    if as_json:
        print_json(
            {
                "pool": ledger.explain(dataset),
                "reservations": [r.to_dict() for r in reservations],
                "recomputed": {"spent": recomputed[0], "held": recomputed[1], "agrees": agrees},
            }
        )
    else:
        print_table(
            "reservations",
            ("job", "state", "steps done", "mechanism", "cost (1e-12 nats)"),
            [(r.id, r.state, r.steps_done, r.mechanism, r.cost) for r in reservations],
        )
        click.echo(f"recomputed from events: {'equal to the balance' if agrees else 'DIFFERENT'}")
    if not agrees:
        raise click.exceptions.Exit(10)


@budget.command()
@click.argument("dataset")
@json_option
@with_session
def explain(session: Session, dataset: str, as_json: bool) -> None:
    """Say which theorem and which accountant stand behind each number of a pool."""
    facts = session.system().kernel.budget.explain(dataset)
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        click.echo(f"  {name}: {value}")
