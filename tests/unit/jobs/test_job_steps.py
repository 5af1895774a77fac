"""The results of a job's steps: stored once, and only by the newest run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import IntegrityError as SqlIntegrityError
from tests.databases import open_store
from tests.jobs import Home, Results, raising, returning, unexpected

from llmos.errors import (
    DataError,
    JobInterrupted,
    JobOvertaken,
    StorageFull,
)
from llmos.jobs.jobs import Job, JobState, Step
from llmos.kernel import schema

pytestmark = pytest.mark.databases


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with closing(open_store(tmp_path / "kernel.db", schema.KERNEL)) as store:
        yield Home(tmp_path, store)


def test_steps_run_in_order_and_get_the_results_before_them(home: Home) -> None:
    job_id = home.submit()
    seen: list[tuple[str, JobState, Results]] = []

    def step(name: str) -> Step:
        def run(job: Job, results: Results) -> dict[str, Any]:
            seen.append((name, home.jobs.job(job.id).state, dict(results)))
            return {"by": name}

        return run

    names = ("b", "a", "c")
    job = home.jobs.run(job_id, {**{name: step(name) for name in names}, "end": home.end})
    assert (job.state, job.result, job.error) == (JobState.DONE, {"steps": 3}, None)
    assert [name for name, _, _ in seen] == list(names)
    assert {state for _, state, _ in seen} == {JobState.RUNNING}
    assert [results for _, _, results in seen] == [
        {},
        {"b": {"by": "b"}},
        {"b": {"by": "b"}, "a": {"by": "a"}},
    ]
    assert not home.jobs.is_live(job_id)


def test_a_failed_job_keeps_its_completed_steps_and_forgets_its_error(home: Home) -> None:
    job_id = home.submit()
    home.fail(job_id, StorageFull("full"))

    def two(job: Job, results: Results) -> dict[str, Any]:
        assert home.jobs.job(job.id).error is None
        assert results == {"one": {"n": 1}}
        home.finish(job)
        return {}

    assert home.jobs.run(job_id, {"one": unexpected, "two": two}).state is JobState.DONE


def test_a_step_that_ended_the_job_before_it_failed_has_ended_it(home: Home) -> None:
    job_id = home.submit()

    def cancel(job: Job, _results: Results) -> dict[str, Any]:
        home.finish(job, JobState.CANCELLED)
        raise DataError("stopped")

    with pytest.raises(DataError):
        home.jobs.run(job_id, {"one": cancel})
    job = home.jobs.job(job_id)
    assert (job.state, job.error) == (JobState.CANCELLED, None)


def test_a_result_that_is_no_json_fails_the_job(home: Home) -> None:
    job_id = home.submit()
    with pytest.raises(rfc8785.CanonicalizationError):
        home.jobs.run(job_id, {"one": returning({"model": object()})})
    assert home.jobs.job(job_id).error == "CanonicalizationError"
    assert home.stored() == {}


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.lists(st.sampled_from(["return", "fail", "stop"]), min_size=3, max_size=3)))
def test_a_steps_result_is_stored_once_and_never_changes(home: Home, runs: list[list[str]]) -> None:
    job_id = home.submit()
    errors: dict[str, Exception] = {"fail": DataError("failed"), "stop": JobInterrupted("stopped")}
    returned: dict[str, str] = {}  # step -> where it returned for the first time

    def step(name: str, number: int, outcome: str) -> Step:
        def run(_job: Job, results: Results) -> dict[str, Any]:
            assert name not in returned
            assert dict(results) == {other: {"by": by} for other, by in returned.items()}
            if outcome != "return":
                raise errors[outcome]
            returned[name] = f"run {number}"
            return {"by": returned[name]}

        return run

    for number, outcomes in enumerate(runs, 1):
        before = home.stored()
        steps = {name: step(name, number, o) for name, o in zip("abc", outcomes, strict=True)}
        with suppress(DataError, JobInterrupted):
            home.jobs.run(job_id, steps)
        assert home.stored().items() >= before.items()
        assert {name for job, name in home.stored() if job == job_id} == set(returned)
        assert home.jobs.job(job_id).attempt == number


@pytest.mark.parametrize("change", ["UPDATE job_steps SET result = '{}'", "DELETE FROM job_steps"])
def test_the_database_itself_refuses_to_change_a_stored_result(home: Home, change: str) -> None:
    home.fail(home.submit(), DataError("failed"))
    before = home.stored()
    with pytest.raises(SqlIntegrityError, match="append-only"), home.store.transaction() as conn:
        conn.exec_driver_sql(change)
    assert home.stored() == before != {}


def test_an_overtaken_runs_result_is_refused_and_the_later_one_stands(home: Home) -> None:
    job_id = home.submit()
    stop = raising(JobInterrupted("stopped"))

    def overtaken(job: Job, _results: Results) -> dict[str, Any]:
        with pytest.raises(JobInterrupted):
            home.overtake(job, {"one": returning({"by": "second"}), "two": stop})
        return {"by": "first"}

    with pytest.raises(JobOvertaken, match=f"another run of job {job_id}") as refused:
        home.jobs.run(job_id, {"one": overtaken, "two": unexpected})
    assert refused.value.hint == f"follow it with `llmos jobs show {job_id}`"
    job = home.jobs.job(job_id)
    assert (job.state, job.error, job.attempt) == (JobState.RUNNING, None, 2)

    def two(job: Job, results: Results) -> dict[str, Any]:
        assert results == {"one": {"by": "second"}}
        return home.end(job, results)

    assert home.jobs.run(job_id, {"one": unexpected, "two": two}).state is JobState.DONE


def test_what_an_overtaken_run_does_to_its_job_is_refused(home: Home) -> None:
    begun: list[Job] = []

    def overtaken(job: Job, _results: Results) -> dict[str, Any]:
        stop = raising(JobInterrupted("stopped"))
        with pytest.raises(JobInterrupted):
            home.overtake(job, {"one": stop})
        after = home.jobs.job(job.id)
        with pytest.raises(JobOvertaken):
            home.point_to(job, "ab12")
        with pytest.raises(JobOvertaken):
            home.finish(job)
        assert home.jobs.job(job.id) == after
        begun.append(after)
        raise DataError("it failed, too")

    job_id = home.submit()
    with pytest.raises(DataError, match="it failed, too"):
        home.jobs.run(job_id, {"one": overtaken})
    assert [home.jobs.job(job_id)] == begun, "nor is the other run's job marked as failed"


def test_a_job_that_another_run_ended_is_not_ended_again(home: Home) -> None:
    job_id = home.submit()

    def overtaken(job: Job, _results: Results) -> dict[str, Any]:
        assert home.overtake(job, {"one": home.end}).state is JobState.DONE
        home.finish(job, JobState.CANCELLED)
        return {}

    with pytest.raises(JobOvertaken):
        home.jobs.run(job_id, {"one": overtaken})
    assert home.jobs.job(job_id).state is JobState.DONE


@pytest.mark.sqlite("the disk of its file")
def test_a_result_that_cannot_be_stored_is_a_typed_error_and_costs_one_step(home: Home) -> None:
    job_id = home.submit()
    with home.process(job_id, "no-room") as process:
        _, stderr = process.communicate()
        assert process.returncode == 1
    assert re.search(r"Storage(Error|Full): .*kernel\.db", stderr.splitlines()[-1])
    assert home.jobs.job(job_id).state is JobState.RUNNING, "there was no room to say otherwise"
    with home.process(job_id) as process:
        process.communicate()
    assert home.jobs.job(job_id).state is JobState.DONE
    assert home.trace() == [f"{job_id} one", *[f"{job_id} two after ['one']"] * 2]
