"""A site's agent beside a coordinator that lies, is not there, or asks again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.certified import adapter_of
from tests.coordinators import ORGANISATION, FakeCoordinator, at_work
from tests.homes import TRAINING, last_records, opened, until
from tests.unit.federations.test_manifest import FIELDS

from llmos.federations import invitations
from llmos.federations.invitations import Invitation, InvitationState
from llmos.system import System
from llmos.workflows import consent

JOB = FIELDS["id"]
OTHER = "bank.example"


@pytest.fixture
def site(home: Path) -> Iterator[System]:
    with opened(home) as system:
        yield system


@pytest.fixture
def coordinator(site: System) -> FakeCoordinator:
    made = FakeCoordinator()
    made.invite(site)
    return made


@pytest.fixture
def runnable(site: System, tiny_model_folder: Path) -> dict[str, Any]:
    """Return the fields of a manifest that this site can run."""
    _, fields = adapter_of(tiny_model_folder)
    digest = site.registry.model(TRAINING["model"]).digest
    return fields | {"model_digest": digest}


def known(site: System) -> Invitation:
    return invitations.invitation(site.kernel.store, JOB)


def is_in(site: System, state: InvitationState) -> None:
    until(lambda: known(site).state is state)


# who asks


def test_a_job_in_anothers_name_is_not_kept(
    site: System, coordinator: FakeCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator.propose(coordinator=f"spiffe://{OTHER}/authority")
    with at_work(site, coordinator, monkeypatch) as agent:
        agent.said(f"names spiffe://{OTHER}/authority as its coordinator")
    assert invitations.invitations(site.kernel.store) == []


@pytest.mark.parametrize("state", [InvitationState.PROPOSED, InvitationState.RUNNING])
def test_a_job_in_anothers_name_that_was_kept_before_does_not_run(
    site: System,
    coordinator: FakeCoordinator,
    monkeypatch: pytest.MonkeyPatch,
    runnable: dict[str, Any],
    state: InvitationState,
) -> None:
    signed = coordinator.manifest(coordinator=f"spiffe://{OTHER}/authority", **runnable)
    with site.kernel.store.transaction() as conn:
        invitations.receive(conn, signed, ORGANISATION)
    job = consent.approve(JOB, site.who, site.parts)  # policy would let it run
    if state is InvitationState.RUNNING:
        plan = invitations.SitePlan(site.datasets.card("notes").fingerprint, 24, 1.0, 2.5)
        with site.kernel.store.transaction() as conn:
            invitations.change(conn, JOB, job.state, state=state, plan=plan.text)
    with at_work(site, coordinator, monkeypatch) as agent:
        agent.said(f"names spiffe://{OTHER}/authority as its coordinator")
    assert known(site).state in {InvitationState.REFUSED, InvitationState.FAILED}
    assert not any(entry["action"] == "federate" for entry in last_records(site, 5))
