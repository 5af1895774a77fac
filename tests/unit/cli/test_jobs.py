from __future__ import annotations

from pathlib import Path

from tests.homes import TRAINING, books, opened
from tests.unit.cli.conftest import Type


def test_jobs_are_resumed_and_cancelled_by_name(typed: Type, home: Path) -> None:
    with opened(home) as system:
        first = system.submit(system.plan(**TRAINING, output="first"))
        second = system.submit(system.plan(**TRAINING, output="second"))
    assert {job["state"] for job in typed("jobs", "ls", "--json").value} == {"queued"}
    assert typed("jobs", "resume", first, "--json").value["model"] == "first"
    cancelled = typed("jobs", "cancel", second)
    assert cancelled.out == f"job {second} is cancelled\n"
    for job, state in ((first, "done"), (second, "cancelled")):
        for verb in ("resume", "cancel"):
            again = typed("jobs", verb, job)
            assert again.status == 11
            assert again.err.startswith(f"llmos: error: job {job} is {state} already")
    assert dict(books(home).jobs) == {first: "done", second: "cancelled"}
