"""The global model's loss after each round is that of the very weights, and rounds do not wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.certified import Job
from tests.homes import write_notes

from llmos.data.datasets import DatasetCard
from llmos.engines.federated.server_optimizer import FedAvg, initial_state
from llmos.federations import register
from llmos.workflows import federate
from llmos.workflows.validation import Validation


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[Job]:
    """Return a job whose coordinator has data of its own."""
    with ExitStack() as stack:
        made = Job(tmp_path_factory.mktemp("job"), tiny_model_folder, stack=stack).run()
        notes = write_notes(made.folder / "trial.jsonl", 12)
        made.coordinator.import_data(
            notes, name="trial", unit="patient_id", text="text", epsilon=1, delta=1e-4
        )
        yield made


def propose(job: Job) -> str:
    """Propose a job that fits the model, with the coordinator's own data as its judge."""
    fields = {"model": "tiny", "data": "notes", "sites": ["east", "north", "south"]}
    request = federate.check(fields | {"epsilon": 3, "rank": 2, "validation": "trial"})
    system = job.coordinator
    return federate.run(request, system.who, system.parts).manifest.id


def judged(job: Job, dataset: str) -> tuple[str, list[str]]:
    """Keep two rounds, let them be judged, and return the job and what was told."""
    system = job.coordinator
    told: list[str] = []
    job_id = propose(job)
    manifest = register.job(system.kernel.store, job_id).manifest
    judge = Validation(manifest, dataset, system.who, system.parts, told.append)
    start = initial_state(np.zeros(manifest.parameters, dtype=np.float32), FedAvg(1.0))
    weights = np.full(manifest.parameters, 0.5, dtype=np.float32)
    for number, values in enumerate((start.weights, weights)):
        with system.kernel.store.transaction() as conn:
            register.keep_round(conn, job_id, number, f"object-{number}", {})
        judge.put(replace(start, round=number + 1, weights=values))
    judge.end()
    judge.start()
    deadline = time.monotonic() + 60
    while len(told) < (2 if dataset == "trial" else 1):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return job_id, told


def test_a_loss_is_kept_for_each_round(job: Job) -> None:
    job_id, told = judged(job, "trial")
    first, second = (row["loss"] for row in register.rounds(job.coordinator.kernel.store, job_id))
    assert told[0].endswith(f"round 1: loss {first:.4f}")
    assert told[1].endswith(f"round 2: loss {second:.4f}")
    assert first > 0
    assert first != second  # the weights of the round were really put in
    card: DatasetCard = job.coordinator.datasets.card("trial")
    admitted = [
        entry.fields
        for entry in job.coordinator.kernel.auditlog.entries(-1, 1000)
        if entry.fields["details"].get("validates") == job_id
    ]
    assert [entry["resource"] for entry in admitted] == [str(card.resource)]


def test_a_judge_without_data_says_so_and_nothing_else_happens(job: Job) -> None:
    job_id, told = judged(job, "none")
    assert "no loss of the global model" in told[0]
    assert [row["loss"] for row in register.rounds(job.coordinator.kernel.store, job_id)] == [
        None,
        None,
    ]
