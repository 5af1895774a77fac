from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from fractions import Fraction
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import insert, update
from sqlalchemy.exc import IntegrityError

from llmos.errors import (
    BudgetExceeded,
    InvalidPrivacyParameter,
    LedgerConflict,
    LlmosError,
    UnaccountableMechanism,
    UnknownDataset,
)
from llmos.kernel import accounting, pricing, schema
from llmos.kernel.budget import Budget, PoolState, Reservation, ReservationState
from llmos.kernel.store import Store
from llmos.privacy import Mechanism, Neighboring, PoissonSampledGaussian, PrivacyLoss, PrivacyUnit

DATA = "patients"
PRINT = "f" * 64
UNIT = PrivacyUnit("patient_id")
TOTAL = PrivacyLoss(3.0, 1e-6, UNIT)
JOB = PoissonSampledGaussian(0.05, 4.0, 200)  # 11 of these fit


def add_dataset(store: Store, name: str = DATA) -> None:
    with store.transaction() as conn:
        conn.execute(
            insert(schema.datasets).values(
                name=name, classification="sensitive", purposes="[]", unit_column="patient_id",
                object_id="o", fingerprint=PRINT, card="{}", created_at="",
            )
        )  # fmt: skip


def make_pool(store: Store, total: PrivacyLoss = TOTAL) -> PoolState:
    with store.transaction() as conn:
        return Budget(store).create_pool(conn, DATA, PRINT, total)


def reserve(store: Store, key: str, mechanism: Mechanism = JOB) -> Reservation:
    with store.transaction() as conn:
        return Budget(store).reserve(conn, key, DATA, PRINT, UNIT.column, mechanism)


def progress(store: Store, key: str, steps: int) -> None:
    with store.transaction() as conn:
        Budget(store).progress(conn, key, steps)


def commit(store: Store, key: str, mechanism: Mechanism) -> Reservation:
    with store.transaction() as conn:
        return Budget(store).commit(conn, key, mechanism)


def abort(store: Store, key: str) -> Reservation:
    with store.transaction() as conn:
        return Budget(store).abort(conn, key)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store.open(tmp_path / "kernel.db", schema.KERNEL)) as store:
        add_dataset(store)
        yield store


@pytest.fixture
def budget(store: Store) -> Budget:
    make_pool(store)
    return Budget(store)


def test_a_new_pool_is_whole(store: Store) -> None:
    pool = make_pool(store)
    assert Budget(store).pool(DATA) == pool
    assert Budget(store).pools() == (pool,)
    assert (pool.total, pool.fingerprint, pool.epsilon, pool.delta) == (TOTAL, PRINT, 3.0, 1e-6)
    assert (pool.spent, pool.held, pool.remaining) == (0, 0, pool.cap)
    assert (pool.spent_share, pool.held_share, pool.remaining_share) == (0, 0, 1)
    assert pool.renyi_order == accounting.fixed_order(3.0, 1e-6)
    exact_cap = accounting.renyi_cap(3.0, 1e-6, pool.renyi_order)
    assert 0 <= Fraction(exact_cap) * 10**12 - pool.cap < 1  # rounded down


def test_a_pool_is_made_once(store: Store, budget: Budget) -> None:
    with pytest.raises(LedgerConflict, match="already"):
        make_pool(store)


@pytest.mark.parametrize(
    ("epsilon", "delta", "why"),
    [(0.02, 1e-6, "larger"), (1e-9, 1e-6, "larger"), (1e8, 1e-6, "smaller")],
)
def test_a_pool_that_could_not_work_is_refused(
    store: Store, epsilon: float, delta: float, why: str
) -> None:
    with pytest.raises(InvalidPrivacyParameter, match=f"epsilon must be {why} at delta 1e-06"):
        make_pool(store, PrivacyLoss(epsilon, delta, UNIT))
    assert Budget(store).pools() == ()


@pytest.mark.parametrize(("epsilon", "delta"), [(float("inf"), 1e-6), (0.0, 1e-6), (1.0, 0.0)])
def test_a_pool_needs_a_real_guarantee(store: Store, epsilon: float, delta: float) -> None:
    with pytest.raises(InvalidPrivacyParameter):
        make_pool(store, PrivacyLoss(epsilon, delta, UNIT))


def test_a_pool_for_another_adjacency_is_refused(store: Store) -> None:
    with pytest.raises(UnaccountableMechanism, match="replace-one"):
        make_pool(store, PrivacyLoss(3.0, 1e-6, UNIT, Neighboring.REPLACE_ONE))


def test_a_dataset_without_a_pool_is_unknown(store: Store) -> None:
    with pytest.raises(UnknownDataset, match="no privacy budget"):
        Budget(store).pool(DATA)


def test_reserve_holds_the_whole_mechanism(store: Store, budget: Budget) -> None:
    held = reserve(store, "job")
    pool = budget.pool(DATA)
    assert held == Reservation("job", DATA, JOB, pool.held, 0, ReservationState.HELD)
    assert held == budget.reservation("job")
    assert held.cost == budget.cost(DATA, JOB)
    assert (pool.spent, pool.remaining) == (0, pool.cap - held.cost)
    assert json.loads(json.dumps(held.to_dict()))["mechanism"]["noise_multiplier"] == 4.0


def test_reserving_again_is_the_same_reservation(store: Store, budget: Budget) -> None:
    first = reserve(store, "job")
    progress(store, "job", 5)
    assert reserve(store, "job") == replace(first, steps_done=5)
    assert budget.pool(DATA).held == first.cost
    with pytest.raises(LedgerConflict, match="another mechanism"):
        reserve(store, "job", JOB.after(199))
    add_dataset(store, "others")
    with store.transaction() as conn:
        budget.create_pool(conn, "others", PRINT, TOTAL)
    with (
        pytest.raises(LedgerConflict, match="another mechanism or dataset"),
        store.transaction() as conn,
    ):
        budget.reserve(conn, "job", "others", PRINT, UNIT.column, JOB)


@pytest.mark.parametrize(
    ("fingerprint", "unit", "why"), [("0" * 64, UNIT.column, "data"), (PRINT, "visit_id", "unit")]
)
def test_other_data_and_other_units_are_not_charged_here(
    store: Store, budget: Budget, fingerprint: str, unit: str, why: str
) -> None:
    with pytest.raises(UnaccountableMechanism, match=f"for the {why}"), store.transaction() as conn:
        budget.reserve(conn, "job", DATA, fingerprint, unit, JOB)
    assert budget.pool(DATA).held == 0


def test_another_adjacency_is_not_charged_here(store: Store, budget: Budget) -> None:
    with store.transaction() as conn:
        conn.execute(update(schema.budget_pools).values(neighboring="replace-one"))
    with pytest.raises(UnaccountableMechanism, match="adjacency replace-one"):
        reserve(store, "job")


def test_commit_spends_what_was_run_and_frees_the_rest(store: Store, budget: Budget) -> None:
    held = reserve(store, "job")
    progress(store, "job", 50)
    settled = commit(store, "job", JOB.after(50))
    assert settled == Reservation(
        "job", DATA, JOB.after(50), held.cost // 4, 50, ReservationState.COMMITTED
    )
    pool = budget.pool(DATA)
    assert (pool.spent, pool.held) == (held.cost // 4, 0) == budget.recompute(DATA)
    assert commit(store, "job", JOB.after(50)) == settled
    assert budget.pool(DATA) == pool
    assert reserve(store, "job") == settled  # it holds nothing, and says so


def test_commit_refuses_what_cannot_have_been_run(store: Store, budget: Budget) -> None:
    reserve(store, "job")
    progress(store, "job", 50)
    for wrong in (
        JOB.after(49),  # fewer than were recorded
        JOB.after(201),
        replace(JOB, noise_multiplier=4.1),
        replace(JOB, sampling_probability=0.04),
    ):
        with pytest.raises(LedgerConflict):
            commit(store, "job", wrong)
    commit(store, "job", JOB)
    for late in (JOB.after(199), JOB.after(50)):
        with pytest.raises(LedgerConflict, match="is committed"):
            commit(store, "job", late)
    with pytest.raises(LedgerConflict, match="is committed"):
        progress(store, "job", 60)
    with pytest.raises(LedgerConflict, match="is committed"):
        abort(store, "job")
    with pytest.raises(LedgerConflict, match="nothing was reserved"):
        commit(store, "nobody", JOB)


def test_progress_only_grows_and_stays_within_the_plan(store: Store, budget: Budget) -> None:
    reserve(store, "job")
    for steps, recorded in ((0, 0), (20, 20), (10, 20), (200, 200)):
        progress(store, "job", steps)
        assert budget.reservation("job").steps_done == recorded
    for wrong in (-1, 201):
        with pytest.raises(LedgerConflict, match="cannot have run"):
            progress(store, "job", wrong)


def test_abort_gives_back_only_before_the_first_step(store: Store, budget: Budget) -> None:
    reserve(store, "early")
    reserve(store, "late")
    progress(store, "late", 1)
    assert abort(store, "early").state is ReservationState.ABORTED
    assert abort(store, "early").cost == 0
    with pytest.raises(LedgerConflict, match="cannot be given back"):
        abort(store, "late")
    assert budget.recompute(DATA) == (0, budget.reservation("late").cost)
    assert reserve(store, "early").state is ReservationState.ABORTED  # not held again
    with pytest.raises(LedgerConflict, match="is aborted"):
        commit(store, "early", JOB.after(0))
    assert [r.id for r in budget.reservations(DATA)] == ["early", "late"]


def test_a_full_pool_refuses_and_says_who_holds_it(store: Store, budget: Budget) -> None:
    commit(store, "done", reserve(store, "done").mechanism)
    for number in range(10):
        reserve(store, f"job-{number}")
    with pytest.raises(BudgetExceeded) as caught:
        reserve(store, "one-too-many")
    assert caught.value.dataset == DATA
    assert "held" in caught.value.message
    assert "job-0, job-1" in caught.value.message
    with pytest.raises(LedgerConflict):
        budget.reservation("one-too-many")
    pool = budget.pool(DATA)
    assert pool.spent + pool.held <= pool.cap


@pytest.mark.parametrize("taken", [0, 6])
def test_the_refusal_says_what_would_fit_and_no_more_would(
    store: Store, budget: Budget, taken: int
) -> None:
    for number in range(taken):
        reserve(store, f"job-{number}")
    big = PoissonSampledGaussian(0.1, 1.2, 150)
    budget.precompute(DATA, big)
    with pytest.raises(BudgetExceeded) as caught:
        reserve(store, "big", big)
    fits = caught.value.feasible
    assert set(fits) == {"epsilon", "steps", "noise_multiplier"}
    assert f"{fits['noise_multiplier']:g}" in caught.value.hint
    free = budget.pool(DATA).remaining

    def by_epsilon(epsilon: float) -> Mechanism:
        noise = accounting.calibrate_noise(0.1, 150, epsilon, TOTAL.delta)
        return replace(big, noise_multiplier=noise)

    steps, noise = int(fits["steps"]), fits["noise_multiplier"]
    assert budget.cost(DATA, big.after(steps)) <= free < budget.cost(DATA, big.after(steps + 1))
    assert budget.cost(DATA, replace(big, noise_multiplier=noise)) <= free
    assert budget.cost(DATA, replace(big, noise_multiplier=noise * 0.997)) > free
    assert budget.cost(DATA, by_epsilon(fits["epsilon"])) <= free
    assert budget.cost(DATA, by_epsilon(fits["epsilon"] * 1.02)) > free
    reserve(store, "smaller", big.after(steps))


def test_a_used_up_pool_says_that_nothing_fits(store: Store, budget: Budget) -> None:
    step = budget.cost(DATA, JOB.after(1))
    reserve(store, "all", JOB.after(budget.pool(DATA).cap // step))
    with store.transaction() as conn:  # spend the last remainder too
        conn.execute(update(schema.budget_pools).values(spent=budget.pool(DATA).remaining))
    with pytest.raises(BudgetExceeded) as caught:
        reserve(store, "more", JOB.after(1))
    assert caught.value.feasible == {"epsilon": 0.0, "steps": 0.0}
    assert "used up" in caught.value.hint
    assert reserve(store, "nothing", JOB.after(0)).cost == 0


def test_without_noise_nothing_is_affordable(store: Store, budget: Budget) -> None:
    with pytest.raises(BudgetExceeded) as caught:
        reserve(store, "bare", replace(JOB, noise_multiplier=1e-170))
    assert caught.value.feasible["steps"] == 0
    assert caught.value.feasible["noise_multiplier"] > 0.1


def test_precompute_leaves_the_pool_alone(budget: Budget) -> None:
    budget.precompute(DATA, JOB)
    assert budget.recompute(DATA) == (0, 0)


def test_explain_names_numbers_and_theorems(store: Store, budget: Budget) -> None:
    assert budget.explain(DATA)["spent_epsilon"] == 0
    reserve(store, "open")
    commit(store, "done", reserve(store, "done").mechanism)
    facts = json.loads(json.dumps(budget.explain(DATA)))
    pool = budget.pool(DATA)
    assert facts["held_by"] == ["open"]
    assert facts["spent_share"] == facts["held_share"] == pool.spent / pool.cap
    assert facts["remaining_share"] == pytest.approx(1 - 2 * facts["spent_share"])
    assert facts["cap_nats"] == pool.cap / pricing.UNITS_PER_NAT
    assert 0 < facts["spent_epsilon"] < 3.0
    assert "2008.11193" in facts["admission"]
    assert "2309.05901" in facts["admission"]
    assert (facts["unit"], facts["neighboring"]) == ("patient_id", "add-or-remove-one")


@pytest.mark.parametrize(
    "change",
    [
        "held = cap + 1",
        "spent = cap + 1",
        "held = cap, spent = 1",
        "held = -1",
        "spent = -1",
        "cap = -1",
    ],
)
def test_the_database_itself_refuses_an_overspent_pool(
    store: Store, budget: Budget, change: str
) -> None:
    with pytest.raises(IntegrityError, match="never_overspent"), store.transaction() as conn:
        conn.exec_driver_sql(f"UPDATE budget_pools SET {change}")  # noqa: S608 - ours
    assert budget.recompute(DATA) == (0, 0)


def test_a_wrong_decision_in_python_cannot_overspend(
    store: Store, budget: Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PoolState, "remaining", property(lambda _: 2**62))
    with pytest.raises(IntegrityError, match="never_overspent"):
        reserve(store, "too-big", replace(JOB, steps=5000))
    assert budget.reservations(DATA) == ()


RUSH = """
import sys
from pathlib import Path
from llmos.errors import BudgetExceeded
from llmos.kernel import schema
from llmos.kernel.budget import Budget
from llmos.kernel.store import Store
from llmos.privacy import PoissonSampledGaussian
store = Store.open(Path(sys.argv[1]), schema.KERNEL)
budget, refused, admitted = Budget(store), 0, 0
for number in range(12):
    job = PoissonSampledGaussian(0.05, 4.0, 60 + 20 * (number % 3))
    key = f"{sys.argv[2]}-{number}"
    try:
        with store.transaction() as conn:
            budget.reserve(conn, key, "patients", "f" * 64, "patient_id", job)
    except BudgetExceeded:
        refused += 1
        continue
    admitted += 1
    with store.transaction() as conn:
        if number % 4 == 0:
            budget.abort(conn, key)
        elif number % 4 == 1:
            budget.commit(conn, key, job.after(job.steps // 2))
print(admitted, refused)
"""


def test_processes_together_never_overspend(store: Store, budget: Budget) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", RUSH, store.path, str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    results = [worker.communicate() for worker in workers]
    assert [error for _, error in results] == [""] * 4
    admitted, refused = (sum(int(out.split()[i]) for out, _ in results) for i in (0, 1))
    assert admitted + refused == 48
    assert refused > 0
    pool, reservations = budget.pool(DATA), budget.reservations(DATA)
    assert len(reservations) == admitted
    assert (pool.spent, pool.held) == budget.recompute(DATA)
    assert 0 < pool.spent + pool.held <= pool.cap
    held = sum(r.cost for r in reservations if r.state is ReservationState.HELD)
    spent = sum(r.cost for r in reservations if r.state is ReservationState.COMMITTED)
    assert (pool.spent, pool.held) == (spent, held)
    assert pool.remaining < budget.cost(DATA, JOB.after(100))  # filled as far as it goes


class LedgerMachine(RuleBasedStateMachine):
    """The ledger against a model of a few lines: a dict of reservations."""

    @initialize()
    def make(self) -> None:
        self.folder = TemporaryDirectory()
        self.store = Store.open(Path(self.folder.name) / "kernel.db", schema.KERNEL)
        add_dataset(self.store)
        self.cap = make_pool(self.store, PrivacyLoss(1.0, 1e-6, UNIT)).cap
        self.budget = Budget(self.store)
        self.unit_cost = self.budget.cost(DATA, JOB.after(1))
        self.names = (f"job-{number}" for number in count())
        self.model: dict[str, dict[str, Any]] = {}

    def total(self, state: str) -> int:
        return sum(self.unit_cost * r["cost"] for r in self.model.values() if r["state"] == state)

    def attempt(self, legal: bool, act: Any, *arguments: Any) -> None:
        try:
            act(self.store, *arguments)
        except LlmosError:
            assert not legal
        else:
            assert legal

    @rule(steps=st.integers(0, 400))
    def reserve(self, steps: int) -> None:
        key = next(self.names)
        taken = self.total("held") + self.total("committed")
        legal = taken + steps * self.unit_cost <= self.cap
        self.attempt(legal, reserve, key, JOB.after(steps))
        if legal:
            self.model[key] = {"state": "held", "cost": steps, "reserved": steps, "done": 0}

    @precondition(lambda self: self.model)
    @rule(data=st.data(), steps=st.integers(0, 400))
    def reserve_again(self, data: st.DataObject, steps: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.model)))
        self.attempt(steps == self.model[key]["reserved"], reserve, key, JOB.after(steps))

    @precondition(lambda self: self.model)
    @rule(data=st.data(), steps=st.integers(0, 400))
    def progress(self, data: st.DataObject, steps: int) -> None:
        job = self.model[key := data.draw(st.sampled_from(sorted(self.model)))]
        legal = job["state"] == "held" and steps <= job["reserved"]
        self.attempt(legal, progress, key, steps)
        if legal:
            job["done"] = max(steps, job["done"])

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        job = self.model[key := data.draw(st.sampled_from(sorted(self.model)))]
        steps = data.draw(st.integers(0, job["reserved"] + 1))
        fresh = job["state"] == "held" and job["done"] <= steps <= job["reserved"]
        again = job["state"] == "committed" and steps == job["cost"]
        self.attempt(fresh or again, commit, key, JOB.after(steps))
        if fresh:
            job.update(state="committed", cost=steps, done=steps)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        job = self.model[key := data.draw(st.sampled_from(sorted(self.model)))]
        fresh = job["state"] == "held" and job["done"] == 0
        self.attempt(fresh or job["state"] == "aborted", abort, key)
        if fresh:
            job.update(state="aborted", cost=0)

    @invariant()
    def balance_equals_model_and_events(self) -> None:
        pool = self.budget.pool(DATA)
        assert (pool.spent, pool.held) == (self.total("committed"), self.total("held"))
        assert (pool.spent, pool.held) == self.budget.recompute(DATA)
        assert {r.id: (str(r.state), r.steps_done) for r in self.budget.reservations(DATA)} == {
            key: (job["state"], job["done"]) for key, job in self.model.items()
        }

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
