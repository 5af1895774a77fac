"""How many jobs one budget admits against adding epsilons, and whether it is ever overspent.

Admission: jobs of one kind, one after another, until the pool refuses; against the number that
fits when each job's own epsilon and delta are added up. Those epsilons are by Renyi accounting, as
training libraries print them (dp_accounting's, which TensorFlow Privacy uses), and by PLD, the
tightest there is for one job. Beside them stands how many fit if all of them are planned in advance
as one mechanism (PLD): no rule that lets later jobs depend on earlier results can admit more.
`--operations 0` measures the admission only.
Overspending: processes reserve, settle and abort at once on one pool that is too small for all of
them, and every balance is compared with its events.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import dp_accounting
from dp_accounting import rdp
from sqlalchemy import Connection, insert

from databases import database, located
from llmos.databases.postgresql import PostgreSQL
from llmos.errors import BudgetExceeded
from llmos.kernel import accounting, caps, schema
from llmos.kernel.budget import Budget
from llmos.kernel.pools import Part
from llmos.kernel.store import Store
from llmos.privacy import PoissonSampledGaussian, PrivacyLoss, PrivacyUnit

DELTA = 1e-6
JOBS = (
    PoissonSampledGaussian(0.01, 2.0, 500),
    PoissonSampledGaussian(0.01, 1.0, 300),
    PoissonSampledGaussian(0.05, 4.0, 200),
)
EPSILONS = (1.0, 3.0, 8.0)
MOST = 400  # jobs that are tried at most
CONTENDED = JOBS[2]  # 11 of these fit at epsilon 3
HELD_AT_ONCE = 2  # by each process


def new_pool(place: Path | PostgreSQL, epsilon: float) -> Store:
    """Make a database with one dataset and its budget."""
    store = Store.open(place, schema.KERNEL)
    with store.transaction() as conn:
        conn.execute(
            insert(schema.datasets).values(
                name="data", classification="sensitive", purposes="[]", unit_column="id",
                object_id="", fingerprint="f", card="{}", created_at="",
            )
        )  # fmt: skip
        caps.create_pool(conn, "data", "f", PrivacyLoss(epsilon, DELTA, PrivacyUnit("id")))
    return store


def reserve(store: Store, key: str, job: PoissonSampledGaussian) -> bool:
    """Reserve a job; False if the pool refuses."""
    try:
        with store.transaction() as conn:
            Budget(store).reserve(conn, key, "data", "f", "id", job, part=Part("training"))
    except BudgetExceeded:
        return False
    return True


def admitted(folder: Path, epsilon: float, job: PoissonSampledGaussian) -> int:
    """Count the jobs that the ledger admits under one cap."""
    store = new_pool(folder / f"{secrets.token_hex(4)}.db", epsilon)
    count = 0
    while count < MOST and reserve(store, f"job-{count}", job):
        count += 1
    store.close()
    return count


def added(epsilon: float, epsilon_of: Callable[[float], float]) -> int:
    """Count the jobs whose epsilons, at an equal share of delta each, add up to the cap at most.

    Args:
        epsilon: the cap.
        epsilon_of: gives the epsilon of one job at a delta.
    """
    count = 0
    while (count + 1) * epsilon_of(DELTA / (count + 1)) <= epsilon:
        count += 1
    return count


def planned(epsilon: float, job: PoissonSampledGaussian) -> int:
    """Count the jobs that fit as one mechanism that is planned in advance."""
    fits, too_many = 0, MOST
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        together = replace(job, steps=job.steps * middle)
        if accounting.epsilon(together, DELTA) <= epsilon:
            fits = middle
        else:
            too_many = middle
    return fits


def renyi_epsilon(job: PoissonSampledGaussian, delta: float) -> float:
    """Return a job's epsilon by Renyi accounting over many orders."""
    gaussian = dp_accounting.GaussianDpEvent(job.noise_multiplier)
    step = dp_accounting.PoissonSampledDpEvent(job.sampling_probability, gaussian)
    accountant = rdp.RdpAccountant()
    accountant.compose(step, job.steps)
    return float(accountant.get_epsilon(delta))


def hammer(place: Path | PostgreSQL, operations: int, name: str) -> None:
    """Reserve and then settle or abort at random, as one of several processes."""
    store = Store.open(place, schema.KERNEL, busy_timeout_s=600.0)
    budget, number, refused = Budget(store), 0, 0
    held: list[str] = []
    for _ in range(operations):
        if len(held) < HELD_AT_ONCE:
            key, number = f"{name}-{number}", number + 1
            if reserve(store, key, CONTENDED):
                held.append(key)
                continue
            refused += 1
        if held:
            with store.transaction() as conn:
                _end(budget, conn, held.pop(0))
    for key in held:
        with store.transaction() as conn:
            budget.abort(conn, key)
    print(json.dumps({"operations": operations, "refused": refused}))


def _end(budget: Budget, conn: Connection, key: str) -> None:
    """Abort, or commit no step, or now and then one: the pool has to last."""
    if secrets.randbelow(2):
        budget.abort(conn, key)
    else:
        budget.commit(conn, key, CONTENDED.after(0 if secrets.randbelow(1000) else 1))


def pairs_per_s(store: Store, count: int) -> float:
    """Return how many jobs a second one process reserves and settles, a transaction each."""
    budget, started = Budget(store), time.perf_counter()
    for number in range(count):
        key = f"pair-{number}"
        assert reserve(store, key, CONTENDED)
        with store.transaction() as conn:
            budget.commit(conn, key, CONTENDED.after(0))
    return round(count / (time.perf_counter() - started), 1)


def overspend(
    folder: Path, place: Path | PostgreSQL, url: str | None, processes: int, operations: int
) -> dict[str, object]:
    """Let processes fight for one pool and compare all that is left with the events."""
    store = new_pool(place, 3.0)
    pairs = pairs_per_s(store, 200)
    address = [] if url is None else ["--database-url", url]
    started = time.perf_counter()
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "--hammer", str(folder), "--name", f"w{number}",
             "--operations", str(operations // processes), *address],
            stdout=subprocess.PIPE, text=True,
        )
        for number in range(processes)
    ]  # fmt: skip
    answers = [json.loads(worker.communicate()[0]) for worker in workers]
    seconds = time.perf_counter() - started
    budget = Budget(store)
    pool, reservations = budget.pool("data"), budget.reservations("data")
    spent = sum(r.cost for r in reservations if r.state == "committed")
    return {
        "database": type(store.database).__name__,
        "reserve_and_settle_pairs_per_s": pairs,
        "processes": processes,
        "operations": sum(answer["operations"] for answer in answers),
        "refused": sum(answer["refused"] for answer in answers),
        "seconds": round(seconds, 1),
        "overspent": max(0, pool.spent + pool.held - pool.cap),
        "equals_events": budget.recompute("data") == pool.balance,
        "equals_reservations": (pool.spent, pool.held) == (spent, 0),
    }


def main() -> None:
    """Measure, print and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument(
        "--database-url", help="contend for a PostgreSQL database instead of a file; nothing else"
    )
    parser.add_argument("--hammer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--name", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.hammer is not None:
        place = located(options.hammer, options.database_url)
        hammer(place, options.operations, options.name)
        return
    load_before = os.getloadavg()[0]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(
            f"{'epsilon':>8}  {'job (q, sigma, steps)':24}{'admitted':>9}"
            f"{'adding RDP':>12}{'ratio':>8}{'adding PLD':>12}{'ratio':>8}{'planned':>9}"
        )
        for epsilon in EPSILONS if options.database_url is None else ():
            for job in JOBS:
                ours = admitted(folder, epsilon, job)
                by_rdp = added(epsilon, partial(renyi_epsilon, job))
                by_pld = added(epsilon, partial(accounting.epsilon, job))
                at_most = planned(epsilon, job)
                text = f"{job.sampling_probability}, {job.noise_multiplier}, {job.steps}"
                rows.append(
                    {
                        "epsilon": epsilon,
                        "job": text,
                        "admitted": ours,
                        "adding_renyi_epsilons": by_rdp,
                        "adding_epsilons": by_pld,
                        "planned_in_advance": at_most,
                    }
                )
                ratios = [f"{ours / n:8.1f}" if n else "       -" for n in (by_rdp, by_pld)]
                print(
                    f"{epsilon:8g}  {text:24}{ours:9}{by_rdp:12}{ratios[0]}{by_pld:12}{ratios[1]}"
                    f"{at_most:9}",
                    flush=True,
                )
        url = options.database_url
        contended = {}
        if options.operations:
            with database(folder, url) as place:
                contended = overspend(folder, place, url, options.processes, options.operations)
            print(json.dumps(contended))
    if options.json is not None:
        machine = {"cores": os.cpu_count(), "cpu": platform.processor() or platform.machine(),
                   "load_before": load_before, "load_after": os.getloadavg()[0]}  # fmt: skip
        facts = {"machine": machine, "admission": rows, "contention": contended}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
