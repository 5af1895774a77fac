from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from sqlalchemy import update
from sqlalchemy.exc import IntegrityError
from tests.databases import open_store

from llmos.crypto import dsse
from llmos.crypto.notes import NoteKey
from llmos.errors import ApprovalConflict, UnknownApproval, VerificationFailed
from llmos.kernel import schema
from llmos.kernel.approvals import RECORD_TYPE, Approval, Approvals, ApprovalState
from llmos.kernel.identity import Identity, Kind, Principal, Role
from llmos.kernel.store import Store

pytestmark = pytest.mark.databases

KEY = NoteKey("llmos.test/certificates", bytes(range(32)))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(open_store(tmp_path / "kernel.db", schema.KERNEL)) as store:
        yield store


@pytest.fixture
def approvals(store: Store) -> Approvals:
    return Approvals(store, KEY)


@pytest.fixture
def people(store: Store) -> tuple[Principal, Principal]:
    """Ada, who asks, and Bob, who has shown an API key."""
    identity = Identity(store, bytes(32))
    with store.transaction() as conn:
        ada = identity.add_principal(conn, "ada", frozenset({Role.STEWARD}))
        bob = identity.add_principal(conn, "bob", frozenset({Role.STEWARD}))
        issued = identity.create_key(conn, bob, "laptop", None, None)
    return ada, identity.authenticate(issued.token)


def propose(approvals: Approvals, who: Principal, reason: str = "a second study") -> Approval:
    with approvals.store.transaction() as conn:
        return approvals.propose(conn, who, "raise-cap", "patients", {"epsilon": 4.0}, reason)


def decide(approvals: Approvals, who: Principal, asked: Approval, *, approve: bool) -> Approval:
    with approvals.store.transaction() as conn:
        return approvals.decide(conn, who, asked.id, approve=approve)


@pytest.mark.parametrize("approve", [True, False])
def test_one_asks_and_another_decides(
    approvals: Approvals, people: tuple[Principal, Principal], approve: bool
) -> None:
    ada, bob = people
    asked = propose(approvals, ada)
    assert approvals.approval(asked.id) == asked
    assert (asked.state, asked.proposer, asked.decider) == (ApprovalState.OPEN, ada.id, None)
    decided = decide(approvals, bob, asked, approve=approve)
    assert decided.state is (ApprovalState.APPROVED if approve else ApprovalState.REFUSED)
    assert decided.decider == bob.id
    assert approvals.approvals() == (decided,)
    assert json.loads(json.dumps(asdict(decided)))["request"] == {"epsilon": 4.0}


def test_the_record_of_a_decision_is_signed_and_says_all(
    approvals: Approvals, people: tuple[Principal, Principal]
) -> None:
    ada, bob = people
    record = decide(approvals, bob, propose(approvals, ada), approve=True).record
    assert record is not None
    said = json.loads(dsse.open_envelope(record, KEY.verifier, payload_type=RECORD_TYPE))
    assert (said["act"], said["subject"], said["request"]) == (
        "raise-cap",
        "patients",
        {"epsilon": 4.0},
    )
    assert (said["proposer"], said["decider"], said["state"]) == (ada.id, bob.id, "approved")
    assert (said["reason"], said["decider_key"]) == ("a second study", bob.key_id)
    stranger = NoteKey(KEY.name, bytes(32))
    with pytest.raises(VerificationFailed):
        dsse.open_envelope(record, stranger.verifier, payload_type=RECORD_TYPE)


def test_who_asked_cannot_decide_even_with_a_key(
    approvals: Approvals, people: tuple[Principal, Principal]
) -> None:
    _, bob = people
    asked = propose(approvals, bob)
    for approve in (True, False):
        with pytest.raises(ApprovalConflict, match="another person"):
            decide(approvals, bob, asked, approve=approve)
    assert approvals.approval(asked.id) == asked


def test_being_named_is_not_enough_to_decide(
    approvals: Approvals, people: tuple[Principal, Principal]
) -> None:
    ada, bob = people
    asked = propose(approvals, ada)
    with pytest.raises(ApprovalConflict, match="API key"):
        decide(approvals, replace(bob, key_id=None), asked, approve=True)
    assert approvals.approval(asked.id) == asked


def test_a_decision_is_final(approvals: Approvals, people: tuple[Principal, Principal]) -> None:
    ada, bob = people
    refused = decide(approvals, bob, propose(approvals, ada), approve=False)
    with pytest.raises(ApprovalConflict, match="refused already"):
        decide(approvals, bob, refused, approve=True)
    assert approvals.approval(refused.id) == refused


def test_a_reason_is_asked_for(approvals: Approvals, people: tuple[Principal, Principal]) -> None:
    with pytest.raises(ApprovalConflict, match="reason"):
        propose(approvals, people[0], reason="  ")
    assert approvals.approvals() == ()


def test_an_unknown_approval(approvals: Approvals, people: tuple[Principal, Principal]) -> None:
    with pytest.raises(UnknownApproval, match="approval-0"):
        approvals.approval("approval-0")


def test_the_database_itself_refuses_one_person_for_both(
    approvals: Approvals, people: tuple[Principal, Principal]
) -> None:
    asked = propose(approvals, people[0])
    with (
        pytest.raises(IntegrityError, match="four_eyes"),
        approvals.store.transaction() as conn,
    ):
        conn.execute(update(schema.approvals).values(decider=people[0].id))
    assert approvals.approval(asked.id) == asked


@pytest.mark.parametrize("part", ["asks", "decides"])
def test_a_service_account_is_neither_of_the_two(
    store: Store, approvals: Approvals, people: tuple[Principal, Principal], part: str
) -> None:
    identity = Identity(store, bytes(32))
    with store.transaction() as conn:
        robot = identity.add_principal(conn, "robot", frozenset({Role.STEWARD}), Kind.SERVICE)
        issued = identity.create_key(conn, robot, "cron", None, None)
    keyed = identity.authenticate(issued.token)
    if part == "asks":
        with pytest.raises(ApprovalConflict, match="service account"):
            propose(approvals, keyed)
        assert approvals.approvals() == ()
        return
    asked = propose(approvals, people[0])
    for approve in (True, False):
        with pytest.raises(ApprovalConflict, match="service account"):
            decide(approvals, keyed, asked, approve=approve)
    assert approvals.approval(asked.id) == asked


def use(approvals: Approvals, who: Principal, subject: str = "patients", eps: float = 4.0) -> str:
    with approvals.store.transaction() as conn:
        return approvals.use(conn, who, "raise-cap", subject, {"epsilon": eps})


def test_an_approval_is_used_once_by_who_asked_and_for_nothing_else(
    approvals: Approvals, people: tuple[Principal, Principal]
) -> None:
    ada, bob = people
    asked = propose(approvals, ada)
    with pytest.raises(UnknownApproval, match="nobody has approved"):
        use(approvals, ada)  # it is open
    decided = decide(approvals, bob, asked, approve=True)
    for who, subject, eps in ((bob, "patients", 4.0), (ada, "wards", 4.0), (ada, "patients", 5.0)):
        with pytest.raises(UnknownApproval):
            use(approvals, who, subject, eps)
    assert approvals.approval(asked.id) == decided
    assert use(approvals, ada) == asked.id
    assert approvals.approval(asked.id).used_at is not None
    with pytest.raises(UnknownApproval):
        use(approvals, ada)


def test_a_refused_approval_cannot_be_used(
    approvals: Approvals, people: tuple[Principal, Principal]
) -> None:
    ada, bob = people
    decide(approvals, bob, propose(approvals, ada), approve=False)
    with pytest.raises(UnknownApproval):
        use(approvals, ada)
