"""A site's agent beside a coordinator that lies, is not there, or asks again."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.coordinators import ORGANISATION, FakeCoordinator, admitted, at_work, runnable_fields
from tests.homes import last_records, opened, until
from tests.unit.federations.test_manifest import FIELDS

from llmos.crypto.notes import NoteKey
from llmos.errors import CertificateRefused, NetworkError, UnknownDataset
from llmos.federations import invitations
from llmos.federations.invitations import Invitation, InvitationState
from llmos.kernel.budget import ReservationState
from llmos.parties import memberships
from llmos.system import System
from llmos.workflows import consent, renew_parties, site_poller

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
    return runnable_fields(site, tiny_model_folder)


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


# answers and holds


def test_a_yes_that_was_lost_is_said_when_the_coordinator_is_back(
    site: System,
    coordinator: FakeCoordinator,
    monkeypatch: pytest.MonkeyPatch,
    runnable: dict[str, Any],
) -> None:
    coordinator.propose(**runnable)
    with at_work(site, coordinator, monkeypatch) as agent:
        agent.said("waits for a steward")
        gone = NetworkError("nobody is there")
        coordinator.fails = {"answer": gone, "poll": gone}
        consent.approve(JOB, site.who, site.parts)
        agent.said("the answer did not arrive")
        coordinator.fails = {}
        until(lambda: coordinator.accepted() == [True])
        coordinator.instructions = [{"job": JOB, "kind": "wait", "round": 0}]
        coordinator.heard("/federation/poll", 40)
        assert coordinator.accepted() == [True]
        # the coordinator has lost it: it asks again
        coordinator.propose(**runnable)
        until(lambda: coordinator.accepted() == [True, True])


def test_a_server_without_time_has_heard_nothing(
    site: System, coordinator: FakeCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator.propose()  # of a model that is not here: it fails, or is refused
    with at_work(site, coordinator, monkeypatch) as agent:
        agent.said("waits for a steward")
        coordinator.fails = {"answer": NetworkError("no time")}
        consent.refuse(JOB, site.who, site.parts, reason="not for us")
        agent.said("the answer did not arrive")
        coordinator.fails = {}
        until(lambda: coordinator.accepted() == [False])
    assert coordinator.answers[0]["reason"] == "not for us"


def test_a_job_that_ended_there_or_counts_on_nobody_gets_no_answer_again(
    site: System, coordinator: FakeCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with site.kernel.store.transaction() as conn:
        invitations.receive(conn, coordinator.manifest(), ORGANISATION)
    consent.refuse(JOB, site.who, site.parts, reason="not for us")
    coordinator.instructions = [
        {"job": JOB, "kind": "ended", "state": "done", "weights_sha256": None},
        {"job": "fed-ffffffffffffffff", "kind": "wait", "round": 0},
    ]
    with at_work(site, coordinator, monkeypatch):
        coordinator.heard("/federation/poll", 40)
        assert coordinator.answers == []
        coordinator.instructions = [{"job": JOB, "kind": "wait", "round": 0}]
        coordinator.heard("/federation/poll", 40)
        assert coordinator.answers == []
        coordinator.propose()  # it has no answer of ours
        until(lambda: coordinator.accepted() == [False])


def test_a_failed_job_is_told_and_settled_also_after_a_kill(
    site: System,
    coordinator: FakeCoordinator,
    monkeypatch: pytest.MonkeyPatch,
    runnable: dict[str, Any],
) -> None:
    held = admitted(site, coordinator, monkeypatch, runnable)
    assert held.state is ReservationState.HELD
    with site.kernel.store.transaction() as conn:  # it was killed right after this
        before = InvitationState.RUNNING
        invitations.change(conn, JOB, before, state=InvitationState.FAILED, reason="no memory")
    task = {"job": JOB, "kind": "round", "phase": "upload", "task": {}, "message": {}}
    coordinator.instructions, coordinator.answers = [task], []
    with at_work(site, coordinator, monkeypatch):
        until(lambda: coordinator.accepted() == [False])
    assert coordinator.answers[0]["reason"] == "no memory"
    assert site.kernel.budget.reservation(JOB).state is ReservationState.ABORTED


def test_what_was_withdrawn_is_settled_without_a_good_certificate(
    site: System,
    coordinator: FakeCoordinator,
    monkeypatch: pytest.MonkeyPatch,
    runnable: dict[str, Any],
) -> None:
    admitted(site, coordinator, monkeypatch, runnable)
    consent.withdraw(JOB, site.who, site.parts, reason="a patient objected")
    coordinator.fails = {"keys": CertificateRefused("the certificate expired")}
    with at_work(site, coordinator, monkeypatch) as agent:
        assert isinstance(agent.ended(), CertificateRefused)
    assert site.kernel.budget.reservation(JOB).state is ReservationState.ABORTED
    assert site.kernel.budget.pool("notes").held == 0


# what it is believed by


def test_an_agent_fetches_the_next_revocation_list_itself(
    site: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator = FakeCoordinator(at=datetime.now(UTC) - timedelta(hours=13))
    coordinator.invite(site)
    before = memberships.membership(ORGANISATION, site.kernel)
    coordinator.fails = {"crl": NetworkError("nobody is there")}
    with at_work(site, coordinator, monkeypatch) as agent:
        agent.said("not renewed yet: nobody is there")  # the present one is good
        coordinator.heard("/federation/poll")
        assert coordinator.asked.count("/party/crl") == 1  # it is not asked at every turn
    coordinator.fails = {}
    with at_work(site, coordinator, monkeypatch):
        coordinator.heard("/federation/poll")
    after = memberships.membership(ORGANISATION, site.kernel)
    assert memberships.crl_number(after.crl) > memberships.crl_number(before.crl)
    assert not renew_parties.is_due(after, datetime.now(UTC))


def test_a_list_that_has_run_out_is_waited_for(
    site: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site_poller, "RETRY_S", 0.05)
    coordinator = FakeCoordinator(at=datetime.now(UTC) - timedelta(hours=25))
    coordinator.invite(site)
    coordinator.fails = {"crl": NetworkError("nobody is there")}
    with at_work(site, coordinator, monkeypatch) as agent:
        agent.said("nobody is there; trying again")
        coordinator.heard("/party/crl")
        assert "/federation/keys" not in coordinator.asked  # nobody would be believed
        coordinator.fails = {}
        agent.said("is there again")
        coordinator.heard("/federation/poll")


def test_an_agent_whose_home_was_revoked_ends(
    site: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator = FakeCoordinator(at=datetime.now(UTC) - timedelta(hours=13))
    coordinator.invite(site)
    member = memberships.membership(ORGANISATION, site.kernel)
    credentials = member.terms(site.kernel).credentials
    assert credentials is not None
    coordinator.revoked = (credentials,)
    with at_work(site, coordinator, monkeypatch) as agent:
        error = agent.ended()
    assert isinstance(error, CertificateRefused)
    assert "revoked this home's certificate" in error.message


# what is no instruction


def test_what_cannot_be_read_does_not_end_the_agent(
    site: System,
    coordinator: FakeCoordinator,
    monkeypatch: pytest.MonkeyPatch,
    runnable: dict[str, Any],
) -> None:
    coordinator.propose(**runnable)
    with at_work(site, coordinator, monkeypatch) as agent:
        agent.said("waits for a steward")
        consent.approve(JOB, site.who, site.parts)
        agent.said("is admitted")
        known_good = {
            "job": JOB,
            "manifest_sha256": known(site).manifest.digest,
            "round": 0,
            "attempt": 1,
            "weights_sha256": "ab" * 32,
            "participants": {},
        }
        about = {"job": JOB, "kind": "round", "phase": "upload", "message": None}
        for changed in (
            {"round": "0"},
            {"round": None},
            {"attempt": -1},
            {"weights_sha256": "../../keys"},
            {"participants": [1]},
            {"participants": {"a": "b"}},
            {"more": 1},
            {"job": "fed-ffffffffffffffff"},
        ):
            agent.told.clear()
            task = coordinator.task(**known_good | changed)
            coordinator.instructions = [about | {"task": task}]
            agent.said("what was signed is no task of a round")
        for wrong in ([1], [{"kind": "ended"}], [{"job": 7}], 5):
            coordinator.instructions = wrong  # type: ignore[assignment]
            agent.told.clear()
            agent.said("instructions cannot be read")
            coordinator.instructions = []
            agent.said("is there again")
        assert agent.thread.is_alive()


@pytest.fixture
def other(site: System) -> FakeCoordinator:
    """Return the coordinator of another federation in which this site takes part."""
    made = FakeCoordinator(OTHER, NoteKey("bank", bytes(range(1, 33))))
    made.invite(site)
    return made


def test_another_organisation_learns_nothing_about_a_job(
    site: System,
    coordinator: FakeCoordinator,
    other: FakeCoordinator,
    monkeypatch: pytest.MonkeyPatch,
    runnable: dict[str, Any],
) -> None:
    admitted(site, coordinator, monkeypatch, runnable)
    consent.withdraw(JOB, site.who, site.parts, reason="a patient objected")
    said = {"job": JOB, "kind": "ended", "state": "done", "statement_wanted": True}
    other.instructions = [said]
    with at_work(site, other, monkeypatch) as agent:
        agent.said("was asked for by another organisation")
    assert other.statements == []


def test_an_id_that_another_organisation_has_taken_is_told(
    site: System,
    coordinator: FakeCoordinator,
    other: FakeCoordinator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other.propose()
    with at_work(site, other, monkeypatch) as agent:
        agent.said("waits for a steward")
    coordinator.propose()
    with at_work(site, coordinator, monkeypatch) as agent:
        agent.said(f"another job of this id was proposed by {OTHER}")
        coordinator.heard("/federation/poll")
        assert len([one for one in agent.told if "another job of this id" in one]) == 1


def test_a_decision_in_the_same_moment_does_not_end_the_agent(
    site: System, coordinator: FakeCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator.propose(dataset="none")

    def decided(*_: object) -> None:
        consent.refuse(JOB, site.who, site.parts, reason="not for us")
        raise UnknownDataset("none", hint="")

    monkeypatch.setattr(site.parts.datasets, "card", decided)
    with at_work(site, coordinator, monkeypatch) as agent:
        until(lambda: coordinator.accepted() == [False])
        assert agent.thread.is_alive()
    assert coordinator.answers[0]["reason"] == "not for us"
