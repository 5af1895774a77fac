"""`llmos train`: print the plan, then train with a live bar."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from llmos.cli.session import (
    Session,
    device_option,
    json_option,
    print_fields,
    print_json,
    with_session,
)

if TYPE_CHECKING:
    from llmos.workflows.training_plan import TrainPlan


@click.command()
@click.option("--data", "dataset", required=True, help="Dataset to learn from.")
@click.option("--model", required=True, help="Base model to start from, or a federated one.")
@click.option("--output", help="Name of the new model; default: DATASET-private or -nonprivate.")
@click.option("--epsilon", type=float, help="Privacy loss of this training, per unit.")
@click.option("--delta", type=float, help="Default: the dataset's delta.")
@click.option(
    "--no-privacy", is_flag=True, help="Train without a guarantee (never on sensitive data)."
)
@click.option("--purpose", default="training", show_default=True)
@click.option("--steps", type=int, help="Optimizer steps; default: from --epochs.")
@click.option(
    "--epochs", type=float, default=10.0, show_default=True, help="Expected passes over the data."
)
@click.option("--batch", type=int, help="Expected units per step; default: chosen from the data.")
@click.option("--clip", type=float, default=1.0, show_default=True, help="Clip norm per unit.")
@click.option("--learning-rate", type=float, default=1e-3, show_default=True)
@click.option("--rank", type=int, default=16, show_default=True, help="LoRA rank.")
@click.option("--last-layers", type=int, help="Train only the last N blocks; default: all.")
@click.option("--max-tokens", type=int, default=256, show_default=True, help="Tokens per record.")
@click.option("--microbatch-tokens", type=int, help="Tokens at once; speed and memory only.")
@click.option("--checkpoint-every", type=float, default=30.0, show_default=True, help="Seconds.")
@click.option("--plan", "plan_only", is_flag=True, help="Print the plan and stop.")
@click.option("--detach", is_flag=True, help="Queue the job for `llmos jobs work` and stop.")
@device_option
@json_option
@with_session
def train(
    session: Session,
    plan_only: bool,
    detach: bool,
    as_json: bool,
    **options: Any,  # noqa: ANN401
) -> None:
    """Fine-tune a model with LoRA on a dataset, under a privacy budget."""
    from llmos.cli.progress import training_progress

    options["checkpoint_every_s"] = options.pop("checkpoint_every")
    options["private"] = not options.pop("no_privacy")
    system = session.system()
    plan = system.plan(**options)
    if not as_json:
        print_plan(plan)
    if plan_only:
        if as_json:
            print_json(plan.to_dict())
        return
    job_id = system.submit(plan)
    if detach:
        if as_json:
            print_json({"job": job_id, "state": "queued", "plan": plan.to_dict()})
            return
        click.echo(f"\njob {job_id} is queued")
        click.echo(f"Next: llmos jobs work --once, or llmos jobs resume {job_id}")
        return
    if not as_json:
        click.echo(f"\njob {job_id} (after a crash: llmos jobs resume {job_id})")
    with training_progress(plan.steps, quiet=as_json) as progress:
        result = system.jobs.resume(job_id, on_step=progress)
    if as_json:
        print_json({**result, "job": job_id, "plan": plan.to_dict()})
        return
    click.echo(
        f"model {result['model']} is ready, encrypted in the vault; {result['seconds']:.0f} s"
    )
    click.echo(f"Next: llmos measure {result['model']}")


def print_plan(plan: TrainPlan) -> None:
    """Print what will be run, what it costs and what remains, before any data is opened."""
    click.echo("Plan")
    print_fields(plan.lines())
