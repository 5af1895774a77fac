from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.databases import open_store
from tests.jobs import Home, Results

from llmos.errors import JobInterrupted
from llmos.jobs.jobs import Job, JobState
from llmos.kernel import schema
from llmos.workflows.ctrl_c import stopped_by_ctrl_c


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with closing(open_store(tmp_path / "kernel.db", schema.KERNEL)) as store:
        yield Home(tmp_path, store)


def test_the_first_ctrl_c_lets_the_step_end_by_itself(home: Home) -> None:
    job_id = home.submit()
    with home.process(job_id, "poll") as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == "stopping\n"
        assert home.jobs.is_live(job_id), "it waits for the step"
        _, stderr = process.communicate("\n")
    assert stderr.rstrip().endswith("JobInterrupted: stopped after step 2")
    job = home.jobs.job(job_id)
    assert (job.state, job.error) == (JobState.RUNNING, None), "it did not fail"


def test_the_second_ctrl_c_breaks_the_step_off(home: Home) -> None:
    job_id = home.submit()
    with home.process(job_id, "poll") as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == "stopping\n"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
        assert process.returncode == -signal.SIGINT
    assert stderr.rstrip().endswith("KeyboardInterrupt")
    assert home.jobs.job(job_id).state is JobState.RUNNING
    assert not home.jobs.is_live(job_id)
    with home.process(job_id) as process:
        process.communicate()
    assert home.jobs.job(job_id).state is JobState.DONE


class LockedEvent(threading.Event):
    """An event whose lock can be held from outside, as `wait` holds it for moments."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def set(self) -> None:
        assert self.lock.acquire(timeout=10), "whoever holds it was interrupted by this very call"
        super().set()
        self.lock.release()


def test_ctrl_c_may_come_at_any_moment_and_is_as_before_when_the_job_has_ended(home: Home) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupt = LockedEvent()

    def press(_job: Job, _results: Results) -> dict[str, Any]:
        with interrupt.lock:
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.wait(60)
        raise JobInterrupted("stopped")

    try:
        for _ in range(2):
            interrupt.clear()
            with pytest.raises(JobInterrupted), stopped_by_ctrl_c(interrupt):
                home.jobs.run(home.submit(), {"one": press})
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_callers_own_ctrl_c_is_left_alone(home: Home) -> None:
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: pressed.append(number))
    try:

        def press(job: Job, _results: Results) -> dict[str, Any]:
            os.kill(os.getpid(), signal.SIGINT)
            home.finish(job)
            return {}

        with stopped_by_ctrl_c(threading.Event()):
            home.jobs.run(home.submit(), {"one": press})
    finally:
        signal.signal(signal.SIGINT, before)
    assert pressed == [signal.SIGINT]
