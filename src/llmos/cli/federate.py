"""`llmos federate`: propose federated trainings, and follow them."""

from __future__ import annotations

import time
from typing import Any

import click

from llmos.cli.session import (
    Session,
    device_option,
    json_option,
    print_fields,
    print_json,
    print_table,
    with_session,
)

LOOK_S = 0.5
_ANSWERS = {None: "not answered", True: "yes", False: "no"}


@click.group(invoke_without_command=True)
@click.option("-f", "--file", type=click.Path(dir_okay=False), help="The job, in YAML.")
@click.option("--detach", is_flag=True, help="Propose it and stop; do not follow it.")
@device_option
@json_option
@click.pass_context
def federate(ctx: click.Context, file: str | None, detach: bool, as_json: bool) -> None:
    """Propose a federated training to its sites and follow it; `coordinator up` runs it."""
    if ctx.invoked_subcommand is not None:
        return
    session = ctx.find_object(Session)
    if file is None or session is None:
        raise click.UsageError("say which job: llmos federate -f JOB.yaml", ctx)
    facts = session.system().federation.propose(file)
    if not as_json:
        print_fields(manifest_lines(facts["manifest"]))
        click.echo(
            f"\n{facts['id']} is proposed; each site decides: llmos site approve {facts['id']}"
        )
    if not detach:
        facts = _follow(session, facts["id"], quiet=as_json)
    if as_json:
        print_json(facts)


@federate.command("ls")
@json_option
@with_session
def list_(session: Session, as_json: bool) -> None:
    """List the federated jobs of this coordinator, newest first."""
    rows = session.system().federation.jobs()
    if as_json:
        print_json(rows)
        return
    print_table(
        "federated jobs",
        ("id", "state", "rounds", "sites", "method", "error"),
        [
            (
                row["id"],
                row["state"],
                f"{row['rounds_done']}/{row['manifest']['rounds']}",
                len(row["manifest"]["sites"]),
                row["manifest"]["adapter"]["parametrisation"],
                row["error"],
            )
            for row in rows
        ],
    )


@federate.command()
@click.argument("job_id")
@json_option
@with_session
def show(session: Session, job_id: str, as_json: bool) -> None:
    """Show a job: its sites and their epsilon, its rounds, bytes, loss, and who is waited for."""
    facts = session.system().federation.facts(job_id)
    if as_json:
        print_json(facts)
        return
    shown = {name: facts[name] for name in ("id", "state", "error") if facts[name]}
    print_fields(shown | manifest_lines(facts["manifest"]) | _under_way(facts["status"]))
    print_table(
        "sites",
        ("site", "takes part", "units", "epsilon at most", "rounds", "bytes up", "waited for"),
        [
            (
                row["site"],
                _ANSWERS[row["accepted"]] + (f": {row['reason']}" if row["reason"] else ""),
                row["units"],
                None if row["epsilon"] is None else f"{row['epsilon']:.3g}",
                row["rounds"],
                f"{row['bytes_up']:,}",
                "yes" if row["waited_for"] else "",
            )
            for row in facts["sites"]
        ],
    )
    print_table(
        "rounds",
        ("round", "sites", "attempts", "seconds", "bytes up", "loss"),
        [
            (
                row["round"] + 1,
                len(row["sites"]),
                row["attempts"],
                f"{row['seconds']:.1f}",
                f"{sum(row['bytes_up'].values()):,}",
                None if row["loss"] is None else f"{row['loss']:.4f}",
            )
            for row in facts["rounds"]
        ],
    )


def _under_way(status: dict[str, Any] | None) -> dict[str, str]:
    """Return what people read of the attempt under way."""
    if status is None or status["phase"] is None:
        return {}
    return {
        "now": f"round {status['round'] + 1}, attempt {status['attempt']}, {status['phase']}, "
        f"{len(status['waiting_for'])} sites are waited for"
    }


@federate.command()
@click.argument("job_id")
@click.option("--reason", required=True, help="Kept in the audit log.")
@json_option
@with_session
def cancel(session: Session, job_id: str, reason: str, as_json: bool) -> None:
    """End a job; its sites settle for what they have run."""
    facts = session.system().federation.cancel(job_id, reason=reason)
    if as_json:
        print_json(facts)
        return
    click.echo(f"{job_id} is {facts['state']}")


def manifest_lines(manifest: dict[str, Any]) -> dict[str, str]:
    """Return what people read of a manifest."""
    privacy, local = manifest["privacy"], manifest["local"]
    how = manifest["aggregation"]
    return {
        "model": f"{manifest['model']} -> {manifest['output']}, "
        f"{manifest['adapter']['parametrisation']} of rank {manifest['adapter']['rank']}, "
        f"{manifest['parameters']:,} weights",
        "data": f"{manifest['dataset']} at each site, for {manifest['purpose']}",
        "sites": ", ".join(site.rpartition("/")[2] for site in manifest["sites"])
        + f"; at least {manifest['minimum_sites']} in a round",
        "rounds": f"{manifest['rounds']} of {local['steps']} steps of {local['batch']} units",
        "guarantee": "NONE: the model may repeat training data word for word"
        if privacy is None
        else f"epsilon {privacy['epsilon']:g} at delta {privacy['delta']:g} for each unit of a "
        "site, at that site",
        "aggregation": f"masked: the coordinator sees sums of {how['threshold']} sites or more"
        if how["kind"] == "masked"
        else f"plain, {how['bits']} bits: the coordinator sees each site's update",
    }


def _follow(session: Session, job_id: str, *, quiet: bool) -> dict[str, Any]:
    """Print rounds as they are done, until the job ends."""
    from llmos.errors import JobError

    shown = 0
    while True:
        facts = session.system().federation.facts(job_id)
        for row in facts["rounds"][shown:]:
            if not quiet:
                up = sum(row["bytes_up"].values())
                click.echo(
                    f"round {row['round'] + 1}/{facts['manifest']['rounds']}: "
                    f"{row['seconds']:.1f} s, {len(row['sites'])} sites, {up:,} bytes up"
                )
        shown = len(facts["rounds"])
        if facts["state"] != "running":
            break
        time.sleep(LOOK_S)
    if facts["state"] != "done":
        raise JobError(f"{job_id} is {facts['state']}: {facts['error']}")
    if not quiet:
        click.echo(f"{job_id} is done: model {facts['manifest']['output']}")
    return dict(facts)
