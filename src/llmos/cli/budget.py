"""`llmos budget`: what each dataset may still pay for, and why."""

from __future__ import annotations

from dataclasses import asdict

import click

from llmos.cli.session import Session, json_option, print_json, print_table, with_session


@click.group()
def budget() -> None:
    """List, show, explain and raise privacy budgets; price a job."""


@budget.command("ls")
@json_option
@with_session
def list_(session: Session, as_json: bool) -> None:
    """List the pools: one for each dataset, and its parts for single purposes and tenants."""
    system = session.system()
    pools = [system.budgets.explain(pool.id) for pool in system.kernel.budget.pools()]
    if as_json:
        print_json(pools)
        return
    print_table(
        "budgets",
        ("pool", "unit", "epsilon", "delta", "spent", "held", "remaining"),
        [
            (
                p["pool"],
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
@click.argument("pool_id", metavar="POOL")
@json_option
@with_session
def show(session: Session, pool_id: str, as_json: bool) -> None:
    """Show the reservations of a pool, and check its balance against its events.

    A dataset's own pool has the dataset's name, that of a purpose is DATASET/PURPOSE, that of a
    tenant DATASET@TENANT, that of a tenant's jobs for a purpose DATASET/PURPOSE@TENANT.
    """
    system = session.system()
    ledger = system.kernel.budget
    pool, recomputed = ledger.pool(pool_id), ledger.recompute(pool_id)
    agrees = recomputed == pool.balance
    reservations = ledger.reservations(pool_id)
    if as_json:
        print_json(
            {
                "pool": system.budgets.explain(pool_id),
                "reservations": [r.to_dict() for r in reservations],
                "recomputed": asdict(recomputed) | {"agrees": agrees},
            }
        )
    else:
        print_table(
            "reservations",
            ("job", "state", "steps done", "mechanism", "cost (1e-12 nats)"),
            [(r.id, r.state, r.steps_done, r.mechanism, r.costs[pool.id]) for r in reservations],
        )
        click.echo(f"recomputed from events: {'equal to the balance' if agrees else 'DIFFERENT'}")
    if not agrees:
        raise click.exceptions.Exit(10)


@budget.command()
@click.argument("pool_id", metavar="POOL")
@json_option
@with_session
def explain(session: Session, pool_id: str, as_json: bool) -> None:
    """Say which theorem and which accountant stand behind each number of a pool."""
    facts = session.system().budgets.explain(pool_id)
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        click.echo(f"  {name}: {value}")


@budget.command("raise")
@click.argument("pool_id", metavar="POOL")
@click.option("--epsilon", type=float, required=True, help="Of the whole pool from then on.")
@click.option("--reason", required=True, help="Why; it is part of the signed record.")
@json_option
@with_session
def raise_(session: Session, pool_id: str, epsilon: float, reason: str, as_json: bool) -> None:
    """Propose a larger budget; nothing changes before another person approves it."""
    asked = session.system().budgets.propose_raise(pool_id, epsilon=epsilon, reason=reason)
    if as_json:
        print_json(asdict(asked))
        return
    click.echo(f"{asked.id}: {pool_id} to epsilon {epsilon:g}; waits for someone else's decision")
    click.echo(f"Next, as another person: llmos approval approve {asked.id}")


@budget.command("what-if")
@click.argument("dataset")
@click.option("--epsilon", type=float, help="Guarantee of the job; or give --noise.")
@click.option("--noise", type=float, help="Noise multiplier of the job; or give --epsilon.")
@click.option("--delta", type=float, help="Default: that of the dataset's budget.")
@click.option("--steps", type=int, required=True)
@click.option("--batch", type=int, required=True, help="Expected units in a step.")
@click.option("--purpose", default="training", show_default=True)
@json_option
@with_session
def what_if(
    session: Session,
    dataset: str,
    epsilon: float | None,
    noise: float | None,
    delta: float | None,
    steps: int,
    batch: int,
    purpose: str,
    as_json: bool,
) -> None:
    """Price a training without reserving anything; exit status 6 if it would be refused."""
    priced = session.system().budgets.what_if(
        dataset,
        epsilon=epsilon,
        noise_multiplier=noise,
        delta=delta,
        steps=steps,
        batch=batch,
        purpose=purpose,
    )
    if as_json:
        print_json(priced.to_dict())
    else:
        from llmos.workflows.budget_advice import hint as budget_hint

        click.echo(
            f"epsilon {priced.epsilon:.4g} at delta {priced.delta:g} (PLD), noise multiplier "
            f"{priced.mechanism.noise_multiplier:.4f}"
        )
        print_table(
            "pools",
            ("pool", "would take", "left now", "admitted", "such jobs that fit"),
            [
                (
                    p.pool,
                    f"{p.share:.1%}",
                    f"{p.remaining_share:.1%}",
                    "yes" if p.admitted else "no",
                    p.jobs_that_fit,
                )
                for p in priced.pools
            ],
        )
        for p in priced.pools:
            if not p.admitted:
                click.echo(f"{p.pool}: {budget_hint(p.would_fit, priced.delta)}")
    if not priced.admitted:
        raise click.exceptions.Exit(6)
