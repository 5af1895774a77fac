"""A steward's consent is what the log has, whatever stands in the job's row."""

from __future__ import annotations

from typing import Any

import pytest
import rfc8785
from sqlalchemy import update
from tests.unit.federations.test_manifest import FIELDS, KEY

from llmos.errors import ConfigError, JobError, TamperedLog
from llmos.federations import invitations
from llmos.federations import manifest as manifests
from llmos.federations.invitations import Invitation, InvitationState
from llmos.federations.tables import site_jobs
from llmos.system import System
from llmos.workflows import consent

JOB = FIELDS["id"]


@pytest.fixture(autouse=True)
def asked(system: System) -> None:
    """Let a coordinator propose a job."""
    with system.kernel.store.transaction() as conn:
        invitations.receive(conn, manifests.sign(manifests.parse(FIELDS), KEY), "research.example")


def job(system: System) -> Invitation:
    return invitations.invitation(system.kernel.store, JOB)


def forge(system: System, **values: Any) -> None:
    """Write to the job's row without an act."""
    with system.kernel.store.transaction() as conn:
        conn.execute(update(site_jobs).values(**values))


def test_nobody_has_consented_before_a_steward_does(system: System) -> None:
    assert consent.given(job(system), system.parts) is None
    approved = consent.approve(JOB, system.who, system.parts)
    assert approved.state is InvitationState.APPROVED
    assert consent.given(approved, system.parts) == system.who.id


@pytest.mark.parametrize("take_back", [consent.refuse, consent.withdraw])
def test_what_was_taken_back_is_no_consent(system: System, take_back: Any) -> None:
    consent.approve(JOB, system.who, system.parts)
    with pytest.raises(ConfigError, match="without a reason"):
        take_back(JOB, system.who, system.parts, reason=" ")
    assert consent.given(job(system), system.parts) == system.who.id
    take_back(JOB, system.who, system.parts, reason="a patient objected")
    assert consent.given(job(system), system.parts) is None
    # also if somebody turns the row back
    forge(system, state=InvitationState.RUNNING, reason=None)
    assert consent.given(job(system), system.parts) is None


def test_a_row_that_was_written_without_an_act_is_no_consent(system: System) -> None:
    forge(system, state=InvitationState.APPROVED, decider=system.who.id)
    with pytest.raises(TamperedLog, match=f"decision about {JOB} that is not in the log"):
        consent.given(job(system), system.parts)


def test_a_consent_is_to_one_manifest(system: System) -> None:
    consent.approve(JOB, system.who, system.parts)
    other = manifests.sign(manifests.parse(FIELDS | {"rounds": 50}), KEY)
    forge(system, envelope=rfc8785.dumps(other.envelope).decode())
    assert job(system).manifest.rounds == 50
    assert consent.given(job(system), system.parts) is None


def test_a_job_is_decided_once(system: System) -> None:
    consent.refuse(JOB, system.who, system.parts, reason="not for us")
    with pytest.raises(JobError, match="is refused"):
        consent.approve(JOB, system.who, system.parts)
    assert consent.given(job(system), system.parts) is None
