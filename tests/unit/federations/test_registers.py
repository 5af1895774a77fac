"""What coordinator and site keep about jobs, and which changes are refused."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tests.parties import kernel_at
from tests.unit.federations.test_manifest import FIELDS, KEY, SITES

from llmos.errors import CertificateRefused, JobError, UnknownJob, UpdateRefused
from llmos.federations import invitations, register
from llmos.federations import manifest as manifests
from llmos.federations.invitations import InvitationState, SitePlan
from llmos.federations.register import FederatedState
from llmos.kernel.kernel import Kernel

SIGNED = manifests.sign(manifests.parse(FIELDS), KEY)
JOB = SIGNED.manifest.id


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    """Return a fresh home."""
    with kernel_at(tmp_path / "home") as made:
        yield made


def test_a_coordinator_keeps_rounds_in_order_and_ends_once(kernel: Kernel) -> None:
    store = kernel.store
    with store.transaction() as conn:
        register.propose(conn, SIGNED, "admin", None)
        register.keep_answer(conn, JOB, SITES[0], {"payload": "yes"})
        register.keep_answer(conn, JOB, SITES[0], {"payload": "no"})
        register.tell(conn, JOB, {"phase": "upload"})
    assert register.answers(store, JOB) == {SITES[0]: {"payload": "no"}}
    job = register.job(store, JOB)
    assert (job.manifest, job.state, job.status) == (
        SIGNED.manifest,
        FederatedState.RUNNING,
        {"phase": "upload"},
    )
    with pytest.raises(JobError), store.transaction() as conn:
        register.keep_round(conn, JOB, 1, "object-2", {})  # the first one has not been
    with store.transaction() as conn:
        register.keep_round(conn, JOB, 0, "object-1", {"sites": ["a"]})
    with pytest.raises(JobError), store.transaction() as conn:
        register.end(conn, job, FederatedState.CANCELLED)  # it was read before that round
    job = register.job(store, JOB)
    assert (job.rounds_done, job.checkpoint) == (1, "object-1")
    assert [row["sites"] for row in register.rounds(store, JOB)] == [["a"]]
    with store.transaction() as conn:
        register.end(conn, job, FederatedState.DONE)
    done = register.job(store, JOB)
    assert (done.state, done.checkpoint, done.status) == (FederatedState.DONE, "object-1", None)
    with pytest.raises(JobError), store.transaction() as conn:
        register.keep_round(conn, JOB, 1, "object-2", {})
    assert [one.id for one in register.jobs(store)] == [JOB]
    with pytest.raises(UnknownJob):
        register.job(store, "fed-0")


def test_a_failed_job_keeps_no_weights(kernel: Kernel) -> None:
    with kernel.store.transaction() as conn:
        register.propose(conn, SIGNED, "admin", None)
        register.keep_round(conn, JOB, 0, "object-1", {})
    with kernel.store.transaction() as conn:
        job = register.job(kernel.store, JOB)
        register.end(conn, job, FederatedState.FAILED, "why")
    ended = register.job(kernel.store, JOB)
    assert (ended.checkpoint, ended.error) == (None, "why")


def test_a_site_changes_a_job_only_from_the_states_that_allow_it(kernel: Kernel) -> None:
    with kernel.store.transaction() as conn:
        invitations.receive(conn, SIGNED, "research.example")
    with pytest.raises(JobError, match="proposed"), kernel.store.transaction() as conn:
        invitations.change(conn, JOB, InvitationState.RUNNING, state=InvitationState.DONE)
    with pytest.raises(UnknownJob), kernel.store.transaction() as conn:
        invitations.change(conn, "fed-0", InvitationState.RUNNING, state=InvitationState.DONE)
    plan = SitePlan("ab" * 32, 24, 1.5, 2.5, "2026-11-24T22:30:00+00:00", "ann")
    with kernel.store.transaction() as conn:
        invitations.change(
            conn,
            JOB,
            InvitationState.PROPOSED,
            state=InvitationState.RUNNING,
            plan=plan.text,
        )
    job = invitations.invitation(kernel.store, JOB)
    assert (job.plan, job.state) == (plan, InvitationState.RUNNING)
    facts = invitations.facts(job)
    assert facts["plan"] == {
        "fingerprint": "ab" * 32,
        "units": 24,
        "noise_multiplier": 1.5,
        "epsilon": 2.5,
        "admitted_at": "2026-11-24T22:30:00+00:00",
        "consent": "ann",
    }
    assert facts["manifest_sha256"] == SIGNED.manifest.digest


def test_rounds_go_forward_and_one_sum_of_each_is_released(kernel: Kernel) -> None:
    with kernel.store.transaction() as conn:
        invitations.receive(conn, SIGNED, "research.example")
    with pytest.raises(JobError, match="is proposed"), kernel.store.transaction() as conn:
        invitations.begin_round(conn, JOB, 0)
    with kernel.store.transaction() as conn:
        invitations.change(conn, JOB, InvitationState.PROPOSED, state=InvitationState.RUNNING)
        invitations.begin_round(conn, JOB, 0)
        invitations.change(conn, JOB, InvitationState.RUNNING, update_round=5)
        invitations.begin_round(conn, JOB, 6)
    for number in (4, 5):
        with pytest.raises(UpdateRefused, match="before"), kernel.store.transaction() as conn:
            invitations.begin_round(conn, JOB, number)
    for number in (4, 6):
        with pytest.raises(UpdateRefused, match="kept"), kernel.store.transaction() as conn:
            invitations.release(conn, JOB, number, SITES)
    for _ in range(2):
        with kernel.store.transaction() as conn:
            invitations.release(conn, JOB, 5, SITES)
    with pytest.raises(UpdateRefused, match="was unmasked"), kernel.store.transaction() as conn:
        invitations.release(conn, JOB, 5, SITES[:2])
    assert invitations.invitation(kernel.store, JOB).released == SITES
    with kernel.store.transaction() as conn:
        invitations.change(
            conn, JOB, InvitationState.RUNNING, state=InvitationState.WITHDRAWN, released=None
        )
    with pytest.raises(JobError, match="is withdrawn"), kernel.store.transaction() as conn:
        invitations.release(conn, JOB, 5, SITES)


def admitted(
    kernel: Kernel, number: int, epsilon: float, at: datetime | None, dataset: str = "notes"
) -> str:
    """Let a job be admitted; before they were kept, times of admission were those of proposals."""
    asked = FIELDS | {"id": f"fed-{number:016x}", "dataset": dataset}
    signed = manifests.sign(manifests.parse(asked), KEY)
    since = None if at is None else at.isoformat()
    plan = SitePlan("ab" * 32, 24, 1.5, epsilon, since).text
    with kernel.store.transaction() as conn:
        invitations.receive(conn, signed, "research.example")
        invitations.change(conn, signed.manifest.id, InvitationState.PROPOSED, plan=plan)
    return signed.manifest.id


def test_the_epsilon_of_a_year_is_that_of_the_other_jobs_of_the_dataset(kernel: Kernel) -> None:
    now = datetime.now(UTC)
    mine = admitted(kernel, 1, 2.5, now)
    admitted(kernel, 2, 1.0, now, "scans")
    admitted(kernel, 3, 0.5, None)

    def year(dataset: str, at: datetime, besides: str = "fed-0") -> float:
        return invitations.epsilon_of_year(kernel.store, dataset, at, besides=besides)

    soon = now + timedelta(minutes=1)
    assert year("notes", soon) == 3.0
    assert year("notes", soon, besides=mine) == 0.5
    assert year("scans", soon) == 1.0
    assert year("notes", now + timedelta(days=364)) == 3.0
    assert year("notes", now + timedelta(days=366)) == 0.0


def test_what_is_admitted_later_does_not_count(kernel: Kernel) -> None:
    noon = datetime(2026, 11, 24, 12, tzinfo=UTC)
    for hours, epsilon in ((-366 * 24, 8.0), (-1, 2.0), (0, 1.0), (1, 4.0)):
        admitted(kernel, hours + 9000, epsilon, noon + timedelta(hours=hours))
    assert invitations.epsilon_of_year(kernel.store, "notes", noon, besides="fed-0") == 3.0


def test_a_coordinators_keys_are_pinned_until_it_is_forgotten(kernel: Kernel) -> None:
    with kernel.store.transaction() as conn:
        invitations.pin_coordinator(conn, "research.example", "keys")
        invitations.pin_coordinator(conn, "research.example", "keys")
    with pytest.raises(CertificateRefused), kernel.store.transaction() as conn:
        invitations.pin_coordinator(conn, "research.example", "other keys")
    with kernel.store.transaction() as conn:
        invitations.forget_coordinator(conn, "research.example")
        invitations.pin_coordinator(conn, "research.example", "other keys")
