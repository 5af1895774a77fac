"""Jobs against a dict: steps end, fail or are cut off, in any order, and none is done twice."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from llmos.errors import JobError, JobInterrupted, JobOvertaken
from llmos.jobs.jobs import Job, Jobs, JobState
from llmos.kernel.schema import KERNEL
from llmos.kernel.store import Store

STEPS = ("fit", "publish")
ENDED = {JobState.DONE, JobState.CANCELLED}


class PowerCut(BaseException):
    """The process ends here: nothing catches this, as nothing catches a kill."""


@dataclass
class Expected:
    state: JobState = JobState.QUEUED
    cancel_requested: bool = False
    attempt: int = 0
    results: list[str] = field(default_factory=list)


class JobsAndDict(RuleBasedStateMachine):
    """Whatever happens to runs, each job stands where the dict says."""

    names = Bundle("names")

    @initialize()
    def make(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.home = Path(self.folder.name)
        (self.home / "run").mkdir()
        self.model: dict[str, Expected] = {}
        self.open()

    def open(self) -> None:
        self.store = Store.open(self.home / "kernel.db", KERNEL)
        self.jobs = Jobs(self.store, self.home)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.open()

    @rule(target=names)
    def submit(self) -> str:
        with self.store.transaction() as conn:
            name = self.jobs.submit(conn, "train", "ada", {"steps": 2})
        self.model[name] = Expected()
        return name

    @rule(
        name=names,
        at=st.sampled_from([*STEPS, "end"]),
        fault=st.sampled_from([ValueError, JobInterrupted, PowerCut]),
    )
    def run_until(self, name: str, at: str, fault: type[BaseException]) -> None:
        """Run a job; at one step something happens, or at the end nothing."""
        expected, before = self.model[name], self.jobs.job(name)
        done: list[str] = []

        def step(which: str) -> Any:
            def work(job: Job, results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
                assert list(results) == expected.results
                if which == at:
                    raise fault("here")
                if which == STEPS[-1]:
                    with self.store.transaction() as conn:
                        self.jobs.finish(conn, job, JobState.DONE, {"ended": True})
                    expected.state = JobState.DONE
                done.append(which)
                expected.results.append(which)
                return {"step": which}

            return work

        steps = {which: step(which) for which in STEPS}
        if expected.state in ENDED:
            with pytest.raises(JobError, match="already"):
                self.jobs.run(name, steps)
            return
        expected.attempt += 1
        if at in expected.results or at == "end":
            assert self.jobs.run(name, steps).state is JobState.DONE
        else:
            with pytest.raises(fault):
                self.jobs.run(name, steps)
            expected.state = JobState.FAILED if fault is ValueError else JobState.RUNNING
        if before.attempt:  # the run before, had it gone on, can write nothing
            with pytest.raises(JobOvertaken), self.store.transaction() as conn:
                self.jobs.set_checkpoint(conn, before, "0" * 32)

    @rule(name=names)
    def cancel(self, name: str) -> None:
        ended = self.model[name].state in ENDED
        try:
            with self.store.transaction() as conn:
                self.jobs.request_cancel(conn, name)
        except JobError:
            assert ended
        else:
            assert not ended
            self.model[name].cancel_requested = True

    @rule(name=names)
    def retry(self, name: str) -> None:
        failed = self.model[name].state is JobState.FAILED
        try:
            with self.store.transaction() as conn:
                self.jobs.retry(conn, name)
        except JobError:
            assert not failed
        else:
            assert failed
            self.model[name].state = JobState.QUEUED

    @invariant()
    def jobs_stand_where_the_dict_says(self) -> None:
        found = {job.id: (job.state, job.cancel_requested, job.attempt) for job in self.jobs.jobs()}
        assert found == {
            name: (e.state, e.cancel_requested, e.attempt) for name, e in self.model.items()
        }
        assert not any(self.jobs.is_live(name) for name in found)

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()


TestJobsAndDict = JobsAndDict.TestCase
TestJobsAndDict.settings = settings.get_profile("machines")
