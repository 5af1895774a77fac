from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
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
from sqlalchemy import insert, select, update
from sqlalchemy.exc import IntegrityError
from tests.databases import open_store

from llmos.errors import (
    BudgetExceeded,
    InvalidPrivacyParameter,
    LedgerConflict,
    LlmosError,
    UnaccountableMechanism,
    UnknownDataset,
)
from llmos.kernel import accounting, caps, schema
from llmos.kernel.budget import Balance, Budget, PoolState, Reservation, ReservationState
from llmos.kernel.pools import Part
from llmos.kernel.store import Store
from llmos.privacy import Mechanism, Neighboring, PoissonSampledGaussian, PrivacyLoss, PrivacyUnit

pytestmark = pytest.mark.databases

DATA = "patients"
PRINT = "f" * 64
UNIT = PrivacyUnit("patient_id")
TOTAL = PrivacyLoss(3.0, 1e-6, UNIT)
JOB = PoissonSampledGaussian(0.05, 4.0, 200)  # 11 of these fit


def add_dataset(
    store: Store, name: str = DATA, *, parents: Sequence[str] = (), block_of: str | None = None
) -> None:
    with store.transaction() as conn:
        conn.execute(
            insert(schema.datasets).values(
                name=name, classification="sensitive", purposes="[]", unit_column="patient_id",
                object_id="o", fingerprint=PRINT, card="{}", created_at="",
                parents=json.dumps(list(parents)), block_of=block_of,
            )
        )  # fmt: skip


def make_pool(
    store: Store,
    total: PrivacyLoss = TOTAL,
    *,
    dataset: str = DATA,
    purpose: str | None = None,
    tenant: str | None = None,
) -> PoolState:
    with store.transaction() as conn:
        return caps.create_pool(conn, dataset, PRINT, total, Part(purpose, tenant))


def raise_cap(store: Store, epsilon: float, *, pool: str = DATA) -> PoolState:
    with store.transaction() as conn:
        return caps.raise_cap(conn, pool, epsilon, approval="approval-1")


def reserve(
    store: Store,
    key: str,
    mechanism: Mechanism = JOB,
    *,
    dataset: str = DATA,
    purpose: str = "training",
    tenant: str | None = None,
) -> Reservation:
    with store.transaction() as conn:
        return Budget(store).reserve(
            conn, key, dataset, PRINT, UNIT.column, mechanism, part=Part(purpose, tenant)
        )


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
    with closing(open_store(tmp_path / "kernel.db", schema.KERNEL)) as store:
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
    assert held == Reservation(
        "job", DATA, "training", None, JOB, {DATA: pool.held}, 0, ReservationState.HELD
    )
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
    make_pool(store, dataset="others")
    with pytest.raises(LedgerConflict, match="another mechanism, dataset"):
        reserve(store, "job", dataset="others")
    with pytest.raises(LedgerConflict, match="or purpose"):
        reserve(store, "job", purpose="research")


@pytest.mark.parametrize(
    ("fingerprint", "unit", "why"), [("0" * 64, UNIT.column, "data"), (PRINT, "visit_id", "unit")]
)
def test_other_data_and_other_units_are_not_charged_here(
    store: Store, budget: Budget, fingerprint: str, unit: str, why: str
) -> None:
    with pytest.raises(UnaccountableMechanism, match=f"for the {why}"), store.transaction() as conn:
        budget.reserve(conn, "job", DATA, fingerprint, unit, JOB, part=Part("training"))
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
        id="job",
        dataset=DATA,
        purpose="training",
        tenant=None,
        mechanism=JOB.after(50),
        costs={DATA: held.cost // 4},
        steps_done=50,
        state=ReservationState.COMMITTED,
    )
    pool = budget.pool(DATA)
    assert budget.recompute(DATA) == pool.balance == Balance(pool.cap, held.cost // 4, 0)
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
    held = budget.reservation("late").cost
    assert budget.recompute(DATA) == Balance(budget.pool(DATA).cap, 0, held)
    assert reserve(store, "early").state is ReservationState.ABORTED  # not held again
    with pytest.raises(LedgerConflict, match="is aborted"):
        commit(store, "early", JOB.after(0))
    assert [r.id for r in budget.reservations(DATA)] == ["early", "late"]
    assert budget.holders(DATA) == ("late",)


def test_a_full_pool_refuses_and_says_who_holds_it(store: Store, budget: Budget) -> None:
    commit(store, "done", reserve(store, "done").mechanism)
    for number in range(10):
        reserve(store, f"job-{number}")
    with pytest.raises(BudgetExceeded) as caught:
        reserve(store, "one-too-many")
    assert caught.value.pool == DATA
    assert "held" in caught.value.message
    assert "job-0, job-1" in caught.value.message
    with pytest.raises(LedgerConflict):
        budget.reservation("one-too-many")
    pool = budget.pool(DATA)
    assert pool.spent + pool.held <= pool.cap


def test_without_noise_nothing_is_affordable(store: Store, budget: Budget) -> None:
    with pytest.raises(BudgetExceeded):
        reserve(store, "bare", replace(JOB, noise_multiplier=1e-170))


def test_precompute_leaves_the_pool_alone(budget: Budget) -> None:
    budget.precompute(DATA, Part("training"), JOB)
    assert budget.recompute(DATA) == budget.pool(DATA).balance


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
    assert budget.recompute(DATA) == budget.pool(DATA).balance


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
from llmos.kernel.pools import Part
from tests.databases import open_store
from llmos.privacy import PoissonSampledGaussian
store = open_store(Path(sys.argv[1]), schema.KERNEL, busy_timeout_s=600)
budget, refused, admitted = Budget(store), 0, 0
for number in range(12):
    job = PoissonSampledGaussian(0.05, 4.0, 60 + 20 * (number % 3))
    key = f"{sys.argv[2]}-{number}"
    try:
        with store.transaction() as conn:
            budget.reserve(
                conn, key, "patients", "f" * 64, "patient_id", job, part=Part("training")
            )
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


def test_every_pool_of_a_charge_pays_or_none(store: Store, budget: Budget) -> None:
    part = make_pool(store, PrivacyLoss(1.0, 1e-6, UNIT), purpose="training")
    assert part.id == f"{DATA}/training"
    assert [pool.id for pool in budget.charged(DATA, Part("training"))] == [DATA, part.id]
    assert [pool.id for pool in budget.charged(DATA, Part("research"))] == [DATA]
    held = reserve(store, "job", JOB.after(10))
    assert held.costs == {pool: budget.cost(pool, JOB.after(10)) for pool in (DATA, part.id)}
    before = budget.pools()
    with pytest.raises(BudgetExceeded, match=f"{part.id} cannot pay"):
        reserve(store, "big", JOB.after(400))  # the whole could, the part cannot
    assert budget.pools() == before
    reserve(store, "research", purpose="research")
    assert [r.id for r in budget.reservations(part.id)] == ["job"]
    commit(store, "job", JOB.after(5))
    abort(store, "research")
    assert [budget.pool(pool).held for pool in (DATA, part.id)] == [0, 0]
    assert all(budget.recompute(pool.id) == pool.balance for pool in budget.pools())


def test_a_tenant_has_a_part_of_the_whole_and_of_a_purpose(store: Store, budget: Budget) -> None:
    small = PrivacyLoss(1.0, 1e-6, UNIT)
    ward = make_pool(store, small, tenant="ward")
    both = make_pool(store, small, purpose="training", tenant="ward")
    assert (ward.id, both.id) == (f"{DATA}@ward", f"{DATA}/training@ward")
    charged = {
        who: {pool.id for pool in budget.charged(DATA, Part(*who))}
        for who in (("training", "ward"), ("care", "ward"), ("training", "lab"), ("training", None))
    }
    assert charged == {
        ("training", "ward"): {DATA, ward.id, both.id},
        ("care", "ward"): {DATA, ward.id},
        ("training", "lab"): {DATA},
        ("training", None): {DATA},
    }
    held = reserve(store, "job", JOB.after(10), tenant="ward")
    assert (held.tenant, set(held.costs)) == ("ward", {DATA, ward.id, both.id})
    with pytest.raises(BudgetExceeded, match=f"{both.id} cannot pay"):
        reserve(store, "big", JOB.after(400), tenant="ward")
    reserve(store, "big", JOB.after(400), tenant="lab")  # the whole can
    abort(store, "job")
    assert (budget.pool(ward.id).held, budget.pool(both.id).held) == (0, 0)


def test_jobs_on_two_blocks_do_not_add_up_and_one_on_the_whole_is_in_each(
    store: Store, budget: Budget
) -> None:
    add_dataset(store, "ancestor")
    make_pool(store, dataset="ancestor")
    add_dataset(store, "whole", parents=["ancestor"])
    make_pool(store, dataset="whole")
    for name in ("whole-1", "whole-2"):
        add_dataset(store, name, parents=["ancestor"], block_of="whole")
        make_pool(store, dataset=name)
    part = make_pool(store, dataset="whole-2", purpose="training")
    add_dataset(store, "heir", parents=["whole-2"])
    make_pool(store, dataset="heir")

    def charged(name: str) -> list[str]:
        return [pool.id for pool in budget.charged(name, Part("training"))]

    assert charged("whole-1") == ["whole-1", "ancestor"]  # of which it is no proven block
    assert charged("whole-2") == ["whole-2", "ancestor", part.id]
    assert charged("heir") == ["heir", "ancestor", "whole-2", part.id]
    assert charged("whole") == ["whole", "ancestor", "whole-1", "whole-2", part.id]
    reserve(store, "first", JOB.after(5), dataset="whole-1")
    held = reserve(store, "second", JOB.after(7), dataset="whole-2")
    reserve(store, "all", JOB.after(9), dataset="whole")
    step = budget.cost("whole", JOB.after(1))
    steps = {"whole": 9, "whole-1": 5 + 9, "whole-2": 7 + 9, "ancestor": 5 + 7 + 9}
    assert {name: budget.pool(name).held for name in steps} == {
        name: pytest.approx(count * step, abs=3) for name, count in steps.items()
    }
    assert budget.pool(part.id).held >= held.costs[part.id] > 0


def test_derived_data_are_charged_to_all_their_ancestors(store: Store, budget: Budget) -> None:
    for name, parents in (("left", [DATA]), ("right", [DATA]), ("joined", ["left", "right"])):
        add_dataset(store, name, parents=parents)
        make_pool(store, dataset=name)
    part = make_pool(store, PrivacyLoss(1.0, 1e-6, UNIT), dataset="left", purpose="training")
    charged = [pool.id for pool in budget.charged("joined", Part("training"))]
    assert charged == ["joined", "left", part.id, DATA, "right"]
    held = reserve(store, "job", JOB.after(3), dataset="joined")
    assert set(held.costs) == set(charged)
    assert budget.pool(DATA).held == held.cost  # once, though two ways lead there
    assert budget.pool(part.id).held == held.costs[part.id]
    reserve(store, "below", JOB.after(3))
    assert budget.pool("joined").held == held.cost  # ancestors do not charge their heirs


def test_an_ancestor_with_another_unit_is_not_charged(store: Store, budget: Budget) -> None:
    add_dataset(store, "heir", parents=[DATA])
    make_pool(store, PrivacyLoss(3.0, 1e-6, PrivacyUnit("visit_id")), dataset="heir")
    with pytest.raises(UnaccountableMechanism, match="for the unit visit_id"):
        reserve(store, "job", dataset="heir")
    assert budget.pool(DATA).held == 0


def test_a_raised_cap_keeps_the_order_and_is_an_event(store: Store, budget: Budget) -> None:
    before = budget.pool(DATA)
    raised = raise_cap(store, 4.0)
    assert raised == budget.pool(DATA)
    assert (raised.epsilon, raised.delta, raised.renyi_order) == (4.0, 1e-6, before.renyi_order)
    exact = accounting.renyi_cap(4.0, 1e-6, before.renyi_order)
    assert 0 <= Fraction(exact) * 10**12 - raised.cap < 1
    assert budget.recompute(DATA) == raised.balance
    with store.read() as conn:
        kinds = conn.execute(select(schema.budget_events.c.kind, schema.budget_events.c.reference))
        assert kinds.all() == [("create", ""), ("raise", "approval-1")]
    for wrong in (4.0, 3.0, float("nan"), 1e9):
        with pytest.raises(InvalidPrivacyParameter):
            raise_cap(store, wrong)
    with pytest.raises(UnknownDataset):
        raise_cap(store, 9.0, pool="nobody")
    assert budget.pool(DATA) == raised


def test_processes_together_never_overspend(store: Store, budget: Budget, tmp_path: Path) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", RUSH, tmp_path / "kernel.db", str(number)],
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
    assert pool.balance == budget.recompute(DATA)
    assert 0 < pool.spent + pool.held <= pool.cap
    held = sum(r.cost for r in reservations if r.state is ReservationState.HELD)
    spent = sum(r.cost for r in reservations if r.state is ReservationState.COMMITTED)
    assert (pool.spent, pool.held) == (spent, held)
    assert pool.remaining < budget.cost(DATA, JOB.after(100))  # filled as far as it goes


class LedgerMachine(RuleBasedStateMachine):
    """The ledger against a model of a few lines: a dict of reservations.

    A dataset has two blocks; some jobs are on one of them, or for a purpose, or of a tenant.
    """

    datasets = (DATA, f"{DATA}-1", f"{DATA}-2")

    @initialize()
    def make(self) -> None:
        self.folder = TemporaryDirectory()
        self.store = open_store(Path(self.folder.name) / "kernel.db", schema.KERNEL)
        whole, half = PrivacyLoss(1.0, 1e-6, UNIT), PrivacyLoss(0.5, 1e-6, UNIT)
        pools = []
        for name in self.datasets:
            add_dataset(self.store, name, block_of=None if name == DATA else DATA)
            pools.append(make_pool(self.store, whole, dataset=name))
        pools.append(make_pool(self.store, half, purpose="training"))
        pools.append(make_pool(self.store, half, tenant="ward"))
        pools.append(
            make_pool(self.store, half, dataset=f"{DATA}-1", purpose="care", tenant="ward")
        )
        self.pools = {pool.id: pool for pool in pools}
        self.budget = Budget(self.store)
        self.caps = {pool.id: pool.cap for pool in pools}
        self.epsilon = whole.epsilon
        self.step_costs = {pool: self.budget.cost(pool, JOB.after(1)) for pool in self.caps}
        self.names = (f"job-{number}" for number in count())
        self.model: dict[str, dict[str, Any]] = {}

    def total(self, pool: str, state: str) -> int:
        """Sum what the reservations in a state take from a pool."""
        jobs = [job for job in self.model.values() if job["state"] == state]
        return sum(self.step_costs[pool] * job["cost"] for job in jobs if pool in job["pools"])

    def attempt(self, legal: bool, act: Any, *arguments: Any, **named: Any) -> None:
        try:
            act(self.store, *arguments, **named)
        except LlmosError:
            assert not legal
        else:
            assert legal

    @rule(
        steps=st.integers(0, 400),
        dataset=st.sampled_from(datasets),
        purpose=st.sampled_from(["training", "care"]),
        tenant=st.sampled_from([None, "ward", "lab"]),
    )
    def reserve(self, steps: int, dataset: str, purpose: str, tenant: str | None) -> None:
        key = next(self.names)
        touched = self.datasets if dataset == DATA else (dataset,)
        pools = [
            pool.id
            for pool in self.pools.values()
            if pool.dataset in touched
            and pool.purpose in (None, purpose)
            and pool.tenant in (None, tenant)
        ]
        whose = {"dataset": dataset, "purpose": purpose, "tenant": tenant}
        legal = all(
            self.total(pool, "held") + self.total(pool, "committed") + steps * self.step_costs[pool]
            <= self.caps[pool]
            for pool in pools
        )
        self.attempt(legal, reserve, key, JOB.after(steps), **whose)
        if legal:
            self.model[key] = {
                "state": "held", "cost": steps, "reserved": steps, "done": 0,
                "whose": whose, "pools": pools,
            }  # fmt: skip

    @rule(factor=st.sampled_from([0.9, 1.0, 1.2]))
    def raise_cap(self, factor: float) -> None:
        self.attempt(factor > 1, raise_cap, factor * self.epsilon)
        if factor > 1:
            self.epsilon *= factor
            self.caps[DATA] = self.budget.pool(DATA).cap

    @precondition(lambda self: self.model)
    @rule(data=st.data(), steps=st.integers(0, 400))
    def reserve_again(self, data: st.DataObject, steps: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.model)))
        job = self.model[key]
        legal = steps == job["reserved"]
        self.attempt(legal, reserve, key, JOB.after(steps), **job["whose"])

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
        for pool, cap in self.caps.items():
            expected = Balance(cap, self.total(pool, "committed"), self.total(pool, "held"))
            assert self.budget.pool(pool).balance == self.budget.recompute(pool) == expected
        for pool in self.caps:
            found = {r.id: (str(r.state), r.steps_done) for r in self.budget.reservations(pool)}
            jobs = {key: job for key, job in self.model.items() if pool in job["pools"]}
            assert found == {key: (job["state"], job["done"]) for key, job in jobs.items()}

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
