from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select
from tests.databases import open_store

from llmos.crypto.notes import NoteKey
from llmos.errors import (
    BudgetExceeded,
    LedgerConflict,
    PermissionDenied,
    StorageFull,
    UnaccountableMechanism,
)
from llmos.kernel import caps, schema
from llmos.kernel.auditlog import AuditLog
from llmos.kernel.budget import Budget, ReservationState
from llmos.kernel.identity import Principal, Role
from llmos.kernel.monitor import Charge, Grant, Monitor
from llmos.kernel.policy import DEFAULTS, Action, Policy, Resource
from llmos.kernel.pools import Part
from llmos.kernel.store import Store
from llmos.privacy import PoissonSampledGaussian, PrivacyLoss, PrivacyUnit

pytestmark = pytest.mark.databases

HOME = Resource("Home", "h")
DATA = Resource("Dataset", "patients", {"classification": "sensitive", "purposes": ("training",)})
MODEL = Resource("Model", "m", {"kind": "base", "classification": "public", "private": False})
ENGINEER = Principal("p1", "erin", frozenset({Role.ENGINEER}))
AUDITOR = Principal("p2", "ada", frozenset({Role.AUDITOR}))
ADMIN = Principal("p3", "root", frozenset({Role.ADMINISTRATOR}))
PRINT = "f" * 64
JOB = PoissonSampledGaussian(0.05, 4.0, 200)
CHARGE = Charge("patients", Part("training"), PRINT, "patient_id", JOB)
TRAINING = {"purpose": "training"}


@dataclass
class Home:
    store: Store
    log: AuditLog
    budget: Budget
    monitor: Monitor
    opened: list[Grant] = field(default_factory=list)

    def records(self) -> list[dict[str, Any]]:
        return [entry.fields for entry in self.log.entries()]

    def outcomes(self) -> list[str]:
        return [record["outcome"] for record in self.records()]

    def settings(self) -> list[str]:
        with self.store.read() as conn:
            return list(conn.execute(select(schema.settings.c.name)).scalars())

    def admit(
        self, *, charge: Charge | None = CHARGE, key: str = "job-1", objects: str = "ab"
    ) -> Any:
        return self.monitor.admit(
            ENGINEER,
            Action.TRAIN_PRIVATE,
            DATA,
            key=key,
            objects=objects,
            charge=charge,
            context=TRAINING,
            details={"plan": 1},
        )

    def fail_in_block(self, error: BaseException, **options: Any) -> None:
        with self.admit(**options) as grant:
            self.opened.append(grant)
            raise error


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with closing(open_store(tmp_path / "kernel.db", schema.KERNEL)) as store:
        log = AuditLog(store, NoteKey("llmos.test/1", bytes(32)))
        budget = Budget(store)
        with store.transaction() as conn:
            conn.execute(
                insert(schema.datasets).values(
                    name="patients", classification="sensitive", purposes="[]",
                    unit_column="patient_id", object_id="a", fingerprint=PRINT, card="{}",
                    created_at="",
                )
            )  # fmt: skip
            total = PrivacyLoss(3.0, 1e-6, PrivacyUnit("patient_id"))
            caps.create_pool(conn, "patients", PRINT, total)
        yield Home(store, log, budget, Monitor(store, Policy.load(DEFAULTS), budget, log))


def put(
    home: Home, name: str, *, who: Principal = ADMIN, fail: BaseException | None = None
) -> None:
    with home.monitor.act(who, Action.MANAGE_KEYS, HOME, details={"name": name}) as conn:
        conn.execute(insert(schema.settings).values(name=name, value=""))
        if fail is not None:
            raise fail


def test_an_act_and_its_record_are_one(home: Home) -> None:
    put(home, "a")
    assert home.settings() == ["a"]
    (record,) = home.records()
    at = record.pop("at")
    assert at.endswith("Z")
    with home.store.read() as conn:
        assert record.pop("state") == schema.standing_digest(conn)
    assert record == {
        "v": 1,
        "actor": "root",
        "action": "manage-keys",
        "resource": "Home::h",
        "outcome": "done",
        "details": {"name": "a", "policies": ["administrator-may-do-all"]},
    }
    assert home.log.verify().size == 1


def test_an_act_that_fails_is_undone_and_recorded_without_its_words(home: Home) -> None:
    with pytest.raises(ValueError, match="Maria Lopez"):
        put(home, "a", fail=ValueError("Maria Lopez"))
    assert home.settings() == []
    (record,) = home.records()
    assert (record["outcome"], record["details"]["error"]) == ("failed", "ValueError")
    assert "Maria" not in str(record)


def test_an_act_that_cannot_be_recorded_does_not_happen(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise StorageFull("no room")

    monkeypatch.setattr(AuditLog, "append", full)
    with pytest.raises(StorageFull) as caught:
        put(home, "a")
    assert "could not be recorded" in "".join(caught.value.__notes__)
    monkeypatch.undo()
    assert home.settings() == []
    assert home.records() == []


def test_details_are_read_when_the_block_ends(home: Home) -> None:
    details: dict[str, Any] = {}
    with home.monitor.act(ADMIN, Action.SERVE, HOME, details=details):
        details["late"] = 7
    assert home.records()[0]["details"]["late"] == 7


def test_a_denial_is_recorded_and_nothing_else_happens(home: Home) -> None:
    with pytest.raises(PermissionDenied, match=r"ada may not manage-keys Home::h: no policy"):
        put(home, "a", who=AUDITOR)
    with pytest.raises(PermissionDenied, match="purpose-limitation"):
        home.monitor.authorize(
            ENGINEER, Action.TRAIN_PRIVATE, DATA, context={"purpose": "marketing"}
        )
    with (
        pytest.raises(PermissionDenied),
        home.monitor.admit(AUDITOR, Action.CHAT, MODEL, key="k", objects=(), charge=None),
    ):
        raise AssertionError("admitted")
    assert home.settings() == []
    assert home.outcomes() == ["denied"] * 3
    assert home.records()[1]["details"] == {
        "policies": ["purpose-limitation"],
        "reason": "forbidden by purpose-limitation",
    }
    assert home.records()[2]["actor"] == "ada"


def test_what_is_left_of_an_approved_act_is_done_and_recorded_without_asking_again(
    home: Home,
) -> None:
    """The one who decided may have lost their role since; the decision stands."""
    row = {
        "id": "approval-1", "act": "erase", "subject": "", "request": "{}", "reason": "asked",
        "proposer": "p1", "proposed_at": "", "state": "approved",
    }  # fmt: skip
    nobody = Principal("p9", "dora", frozenset())

    def fulfil(approval: str) -> None:
        details = {"approval": approval}
        with home.monitor.fulfil(nobody, approval, Action.ERASE_DATA, HOME, details) as conn:
            conn.execute(insert(schema.settings).values(name=approval, value="done"))

    with home.store.transaction() as conn:
        person = {"id": "p1", "name": "erin", "roles": "[]", "created_at": ""}
        conn.execute(insert(schema.principals).values(person))
        conn.execute(insert(schema.approvals).values(row))
        conn.execute(insert(schema.approvals).values(row | {"id": "approval-2", "state": "open"}))
    fulfil("approval-1")
    assert home.settings() == ["approval-1"]
    (record,) = home.records()
    assert (record["actor"], record["action"], record["outcome"]) == ("dora", "erase-data", "done")
    assert record["details"] == {"approval": "approval-1", "policies": ["approval-1"]}
    for other in ("approval-2", "approval-3"):
        with pytest.raises(PermissionDenied, match=f"{other} was not approved"):
            fulfil(other)
    assert home.settings() == ["approval-1"]
    assert len(home.records()) == 1


def test_an_error_of_the_policies_is_a_denial_and_a_record(home: Home, tmp_path: Path) -> None:
    broken = "forbid (principal, action, resource) when { 9223372036854775807 + 1 > 0 };"
    policy = Policy.parse({"a.cedar": "permit (principal, action, resource);\n" + broken})
    monitor = replace(home.monitor, policy=policy)
    with pytest.raises(PermissionDenied), monitor.act(ADMIN, Action.MANAGE_KEYS, HOME) as conn:
        conn.execute(insert(schema.settings).values(name="a", value=""))
    assert home.settings() == []
    (record,) = home.records()
    assert record["outcome"] == "denied"
    assert "could not be evaluated" in record["details"]["reason"]
    assert "overflow" in record["details"]["reason"]


def test_asking_is_not_recorded_when_it_is_allowed(home: Home) -> None:
    home.monitor.authorize(ENGINEER, Action.CHAT, MODEL)
    assert home.records() == []


def test_the_api_key_that_was_used_is_recorded(home: Home) -> None:
    by_key = Principal("p1", "erin", frozenset({Role.ENGINEER}), frozenset({"m"}), "AbCdEfGh")
    with home.monitor.act(by_key, Action.CHAT, MODEL):
        pass
    assert home.records()[0]["details"]["api_key"] == "AbCdEfGh"
    with pytest.raises(PermissionDenied):
        home.monitor.authorize(by_key, Action.PULL_MODEL, MODEL)


def test_admission_reserves_and_records_before_anything_is_opened(home: Home) -> None:
    with home.admit() as grant:
        held = home.budget.reservation("job-1")
        assert held.state is ReservationState.HELD
        (record,) = home.records()
        assert record["outcome"] == "admitted"
        details = record["details"]
        assert (details["job"], details["plan"], details["dataset"]) == ("job-1", 1, "patients")
        assert details["costs"] == {"patients": str(held.cost)}
        assert details["mechanism"]["steps"] == 200
        assert [grant.permits(name) for name in "abc"] == [True, True, False]
        grant.extend("c")
        assert grant.permits("c")
    assert home.outcomes() == ["admitted"]
    assert home.budget.reservation("job-1").state is ReservationState.HELD  # not settled: it stays


def test_a_grant_is_dead_after_its_block(home: Home) -> None:
    with home.admit() as grant:
        pass
    assert not grant.permits("a")
    for use in (
        lambda: grant.extend("c"),
        lambda: grant.progress(1),
        lambda: grant.settle(JOB),
        grant.abort,
    ):
        with pytest.raises(LedgerConflict, match="has ended"):
            use()
    assert home.outcomes() == ["admitted"]


def test_steps_and_settlement_are_recorded(home: Home) -> None:
    with home.admit() as grant:
        grant.progress(50)
        assert home.budget.reservation("job-1").steps_done == 50
        grant.settle(JOB.after(60), details={"digest": "d"})
    assert home.outcomes() == ["admitted", "progressed", "settled"]
    settled = home.records()[2]["details"]
    reservation = home.budget.reservation("job-1")
    assert reservation.state is ReservationState.COMMITTED
    assert (settled["mechanism"]["steps"], settled["digest"]) == (60, "d")
    assert settled["costs"] == {"patients": str(reservation.cost)}


def test_settlement_can_join_a_larger_transaction(home: Home) -> None:
    def settle_and_publish(name: str, fail: BaseException | None) -> None:
        with home.admit() as grant, home.store.transaction() as conn:
            conn.execute(insert(schema.settings).values(name=name, value=""))
            grant.settle(JOB, conn=conn)
            if fail is not None:
                raise fail

    with pytest.raises(KeyboardInterrupt):
        settle_and_publish("a", KeyboardInterrupt())
    assert home.budget.reservation("job-1").state is ReservationState.HELD
    settle_and_publish("b", None)
    assert home.budget.reservation("job-1").state is ReservationState.COMMITTED
    assert home.settings() == ["b"]
    assert home.outcomes() == ["admitted", "failed", "admitted", "settled"]


def test_abort_gives_back_what_was_never_run(home: Home) -> None:
    with home.admit() as grant:
        grant.abort()
    assert home.budget.pool("patients").held == 0
    with home.admit(key="job-2") as grant:
        grant.progress(1)
        with pytest.raises(LedgerConflict, match="given back"), home.store.transaction() as conn:
            grant.abort(conn=conn)
    assert home.outcomes() == ["admitted", "aborted", "admitted", "progressed"]


def test_an_exception_leaves_the_hold_and_is_recorded(home: Home) -> None:
    with pytest.raises(KeyboardInterrupt):
        home.fail_in_block(KeyboardInterrupt())
    assert home.budget.reservation("job-1").state is ReservationState.HELD
    assert home.outcomes() == ["admitted", "failed"]
    assert home.records()[1]["details"]["error"] == "KeyboardInterrupt"
    assert not home.opened[0].permits("a")


def test_the_same_admission_goes_on_with_the_same_hold(home: Home) -> None:
    with pytest.raises(ZeroDivisionError):
        home.fail_in_block(ZeroDivisionError())
    cost = home.budget.pool("patients").held
    with home.admit() as grant:
        assert grant.permits("a")
        grant.settle(JOB)
    pool = home.budget.pool("patients")
    assert (pool.spent, pool.held) == (cost, 0)


@pytest.mark.parametrize("end", ["settle", "abort"])
def test_what_was_ended_opens_no_data_again_but_may_be_ended_again(home: Home, end: str) -> None:
    def finish(grant: Grant) -> None:
        grant.settle(JOB) if end == "settle" else grant.abort()

    with home.admit() as grant:
        finish(grant)
    before = home.budget.pool("patients")
    with pytest.raises(LedgerConflict, match="opens no data again"), home.admit():
        raise AssertionError("admitted")
    with home.admit(objects="") as grant:
        finish(grant)
        with pytest.raises(LedgerConflict):
            grant.progress(1)
    assert home.budget.pool("patients") == before


def test_admission_without_a_charge_has_no_steps(home: Home) -> None:
    with home.admit(charge=None) as grant:
        assert grant.permits("a")
        for use in (lambda: grant.progress(1), lambda: grant.settle(JOB), grant.abort):
            with pytest.raises(LedgerConflict, match="without a charge"):
                use()
    assert home.outcomes() == ["admitted"]


def test_what_the_ledger_refuses_is_recorded_and_opens_nothing(home: Home) -> None:
    too_much = Charge("patients", Part("training"), PRINT, "patient_id", JOB.after(200 * 12))
    other_data = Charge("patients", Part("training"), "0" * 64, "patient_id", JOB)
    for charge, error in ((too_much, BudgetExceeded), (other_data, UnaccountableMechanism)):
        with pytest.raises(error), home.admit(charge=charge):
            raise AssertionError("admitted")
    assert home.budget.pool("patients").held == 0
    assert home.outcomes() == ["refused", "refused"]
    assert [r["details"]["error"] for r in home.records()] == [
        "BudgetExceeded", "UnaccountableMechanism",
    ]  # fmt: skip


def test_a_fault_during_admission_is_a_failure_and_no_refusal(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Budget, "precompute", broken)
    with pytest.raises(MemoryError), home.admit():
        raise AssertionError("admitted")
    assert home.outcomes() == ["failed"]


KILLED = """
import sys
from pathlib import Path
from llmos.crypto.notes import NoteKey
from llmos.kernel import caps, schema
from llmos.kernel.auditlog import AuditLog
from llmos.kernel.budget import Budget
from llmos.kernel.identity import Principal, Role
from llmos.kernel.monitor import Charge, Monitor
from llmos.kernel.policy import DEFAULTS, Action, Policy, Resource
from llmos.kernel.pools import Part
from tests.databases import open_store
from llmos.privacy import PoissonSampledGaussian
store = open_store(Path(sys.argv[1]), schema.KERNEL)
log = AuditLog(store, NoteKey("llmos.test/1", bytes(32)))
monitor = Monitor(store, Policy.load(DEFAULTS), Budget(store), log)
data = Resource("Dataset", "patients", {"classification": "sensitive", "purposes": ("training",)})
job = PoissonSampledGaussian(0.05, 4.0, 200)
with monitor.admit(
    Principal("p1", "erin", frozenset({Role.ENGINEER})), Action.TRAIN_PRIVATE, data,
    key="job-1", objects="a",
    charge=Charge("patients", Part("training"), "f" * 64, "patient_id", job),
    context={"purpose": "training"},
) as grant:
    grant.progress(30)
    print("running", flush=True)
    sys.stdin.readline()
"""


def test_a_killed_job_keeps_its_hold_and_its_steps(home: Home, tmp_path: Path) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path / "kernel.db"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout is not None
    assert worker.stdout.readline() == "running\n"
    worker.kill()
    worker.communicate()
    left = home.budget.reservation("job-1")
    assert (left.state, left.steps_done) == (ReservationState.HELD, 30)
    assert home.outcomes() == ["admitted", "progressed"]
    with home.admit() as grant:
        with pytest.raises(LedgerConflict):
            grant.settle(JOB.after(29))
        grant.settle(JOB.after(30))
    assert home.log.verify().size == 4
