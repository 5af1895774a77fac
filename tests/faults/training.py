"""A training job without its arithmetic: all that one writes, and by the same code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from llmos.jobs.jobs import JobState

if TYPE_CHECKING:
    from llmos.jobs.jobs import Job
    from llmos.system import System

STEPS: Final = 3  # each with a checkpoint


def submit(system: System) -> None:
    """Submit the job; its model has a name only."""
    from llmos.workflows import training_acts
    from llmos.workflows.train import KIND
    from llmos.workflows.training_request import TrainRequest

    card = system.datasets.card("notes")
    request = TrainRequest(
        dataset=card.name,
        fingerprint=card.fingerprint,
        model="tiny",
        output="notes-private",
        purpose="training",
        epsilon=3,
        delta=1e-6,
        units=card.units,
        batch=card.units,
        steps=STEPS,
        clip=1,
        noise_multiplier=10,
        learning_rate=0.01,
        rank=4,
        last_layers=None,
        max_tokens=32,
        max_records_per_unit=1,
        microbatch_tokens=None,
        checkpoint_every_s=0,
        seed=None,
    )
    kernel = system.kernel
    action, resource, context = training_acts.act(request, card)
    with kernel.monitor.act(system.who, action, resource, context=context) as conn:
        system.registry.register_base(conn, "tiny", "models/tiny", "0" * 64, {})
        system.parts.jobs.submit(conn, KIND, system.who.name, request.model_dump(mode="json"))


def run(system: System, saved: Callable[[int], None]) -> None:
    """Run the job to its end, from its newest checkpoint on; `saved` hears of each new one.

    A failed job is put back into the queue first, as a person would do it.
    """
    from llmos.workflows import train, training_acts

    (job,) = system.parts.jobs.jobs()
    if job.state is JobState.DONE:
        return
    if job.state is JobState.FAILED:
        train.retry(job.id, system.who, system.parts, reason="the disk works again")
    publish = partial(training_acts.publish, who=system.who, parts=system.parts)

    def fit(job: Job, _results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        return _fit(system, job, saved)

    system.parts.jobs.run(job.id, {"fit": fit, "publish": publish})


def _fit(system: System, job: Job, saved: Callable[[int], None]) -> dict[str, Any]:
    from llmos.workflows import training_acts
    from llmos.workflows.checkpoints import Checkpoints
    from llmos.workflows.training_request import TrainRequest

    request = TrainRequest.model_validate(job.request)
    card = system.datasets.card(request.dataset)
    action, resource, context = training_acts.act(request, card)
    with system.kernel.monitor.admit(
        system.who,
        action,
        resource,
        key=job.id,
        objects=frozenset(filter(None, (card.object_id, job.checkpoint))),
        charge=training_acts.charge(request, card),
        context=context,
    ) as grant:
        done = 0
        if job.checkpoint is not None:
            done = int(system.kernel.vault.read(job.checkpoint, "checkpoint", grant)[:1])
        saver = Checkpoints(system.parts, grant, job, card, charged=True, erased=0)
        for step in range(done + 1, STEPS + 1):
            saver.save(content(step), step)
            saved(step)
        adapter, digest = system.registry.store_adapter({"adapter": b"weights"})
    return {
        "adapter": adapter,
        "digest": digest,
        "steps": STEPS,
        "seconds": 1.0,
        "tokens_per_s": 1.0,
        "randomness": "none",
        "dtype_path": "none",
        "self_test": {},
    }


def content(step: int) -> bytes:
    """Return the state after a step; it takes several chunks of ciphertext."""
    return f"{step}".encode() * 40_000
