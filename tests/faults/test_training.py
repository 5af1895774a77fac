"""A training's checkpoints, charge and result on a disk that fails."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.faults import training
from tests.faults.disk import Fault
from tests.faults.injection import FAULTS, Injector, Trial, injector
from tests.faults.state import Everything

from llmos.jobs.jobs import JobState
from llmos.system import System

pytestmark = pytest.mark.sqlite("the disk that fails is that of this process, not of a server")


def go_on(system: System, trial: Trial) -> None:
    """Look at the job as the fault left it, then run it to its end where it has not got there."""
    (job,) = system.parts.jobs.jobs()
    kernel = system.kernel
    newest = 0
    if job.checkpoint is not None:
        state = kernel.vault.read(job.checkpoint, "checkpoint", Everything())
        newest = int(state[:1])
        assert state == training.content(newest)
    if job.state is not JobState.DONE:
        assert trial.saved <= newest <= trial.saved + 1  # of what was acknowledged nothing is lost
        reservations = kernel.budget.reservations("notes")
        charged = max((found.steps_done for found in reservations), default=0)
        assert newest <= charged <= trial.saved + 1  # charged before it is kept
        assert [model.name for model in system.registry.models()] == ["tiny"]
        training.run(system, lambda _step: None)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Injector]:
    with injector("training", tmp_path_factory.mktemp("training"), go_on) as made:
        yield made


@pytest.mark.parametrize("fault", FAULTS)
def test_no_checkpoint_is_lost_and_nothing_is_charged_twice(job: Injector, fault: Fault) -> None:
    assert job.sweep(fault) > 10
