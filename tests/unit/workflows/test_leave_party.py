"""To leave an organisation: nothing is held for it any more, and its coordinator is forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.coordinators import ORGANISATION, FakeCoordinator, admitted, at_work, runnable_fields
from tests.homes import opened
from tests.unit.federations.test_manifest import FIELDS

from llmos.crypto.notes import NoteKey
from llmos.errors import CertificateRefused, JobBusy, JobError, UnknownParty
from llmos.kernel.budget import ReservationState
from llmos.parties import memberships
from llmos.system import System
from llmos.workflows import consent, sole_process

JOB = FIELDS["id"]


@pytest.fixture
def site(home: Path) -> Iterator[System]:
    with opened(home) as system:
        yield system


@pytest.fixture
def runnable(site: System, tiny_model_folder: Path) -> dict[str, Any]:
    return runnable_fields(site, tiny_model_folder)


def state(site: System) -> ReservationState:
    return site.kernel.budget.reservation(JOB).state


def test_nobody_leaves_a_job_that_runs(
    site: System, runnable: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator = FakeCoordinator()
    coordinator.invite(site)
    admitted(site, coordinator, monkeypatch, runnable)
    with pytest.raises(JobError, match=f"{JOB} of {ORGANISATION} runs here") as refused:
        site.parties.leave(ORGANISATION)
    assert f"llmos site withdraw {JOB}" in refused.value.hint
    with sole_process.as_site(ORGANISATION, site.kernel), pytest.raises(JobBusy):
        site.parties.leave(ORGANISATION)
    assert site.federation.withdraw(JOB, reason="a patient objected")["state"] == "withdrawn"
    assert state(site) is ReservationState.ABORTED  # no agent is there to settle it
    assert site.parties.leave(ORGANISATION) == []
    with pytest.raises(UnknownParty):
        memberships.membership(ORGANISATION, site.kernel)


def test_what_ended_is_settled_by_who_leaves(
    site: System, runnable: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator = FakeCoordinator()
    coordinator.invite(site)
    admitted(site, coordinator, monkeypatch, runnable)
    consent.withdraw(JOB, site.who, site.parts, reason="a patient objected")
    assert state(site) is ReservationState.HELD
    site.parties.leave(ORGANISATION)
    assert state(site) is ReservationState.ABORTED


def test_with_a_certificate_that_is_over_a_job_waits_for_the_next_one(
    site: System, runnable: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator = FakeCoordinator(at=datetime.now(UTC) - timedelta(days=31))
    coordinator.invite(site)
    admitted(site, coordinator, monkeypatch, runnable)
    assert site.parties.leave(ORGANISATION) == [JOB]
    assert state(site) is ReservationState.HELD
    site.federation.withdraw(JOB, reason="it is over")  # also of who is no member any more
    assert state(site) is ReservationState.ABORTED


def test_who_left_joins_the_new_home_of_a_coordinator(
    site: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = FakeCoordinator(), FakeCoordinator(key=NoteKey("research", bytes(32)))
    before.invite(site)
    with at_work(site, before, monkeypatch):
        before.heard("/federation/poll")
    with at_work(site, after, monkeypatch) as agent:
        error = agent.ended()
    assert isinstance(error, CertificateRefused)
    assert "signs with other keys than before" in error.message
    site.parties.leave(ORGANISATION)
    after.invite(site)
    with at_work(site, after, monkeypatch):
        after.heard("/federation/poll")
