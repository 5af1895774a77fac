"""Durable appends a second beside what the disk can sync, and the time of one inclusion proof.

    python benchmarks/audit_log.py --json benchmarks/results/audit_log.json

Appends go through the real store: SQLite (WAL, synchronous=FULL), or PostgreSQL by --database-url,
whose disk should then be this one. Each batch is one transaction
under one signed checkpoint. In every round the rate at which this disk makes a 4 KiB write
durable is measured directly before the batches, because it changes from minute to minute. The
proof is made in a log of a million entries and verified offline before its time counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from databases import database
from llmos.crypto.notes import NoteKey
from llmos.kernel.auditlog import AuditLog
from llmos.kernel.schema import KERNEL
from llmos.kernel.store import Store
from llmos.transparency.proofs import prove, verify_proof

BATCHES = {1: 100, 10: 40, 100: 25}  # entries in a transaction -> transactions in a round
LARGE_BATCH = 10_000
GOAL_PER_S = 10_000  # at the largest batch, or 80 entries for each sync, whichever is lower
GOAL_PER_SYNC = 80
GOAL_PROOF_MS = 5.0


def entry(number: int) -> dict[str, Any]:
    """Return an entry of the size and shape that the monitor writes."""
    return {
        "v": 1,
        "at": "2026-01-01T00:00:00.000Z",
        "actor": "ada",
        "action": "chat",
        "resource": "Model::ward",
        "outcome": "done",
        "details": {"number": number, "policies": ["developer-uses-models"]},
    }


def per_second(act: Callable[[], object], times: int) -> float:
    """Return how often an act was done in a second."""
    started = time.perf_counter()
    for _ in range(times):
        act()
    return times / (time.perf_counter() - started)


def sync_rate(folder: Path) -> float:
    """Return how many 4 KiB writes a second this disk makes durable."""
    descriptor = os.open(folder / "synced", os.O_CREAT | os.O_WRONLY)

    def synced() -> None:
        os.write(descriptor, bytes(4096))
        os.fsync(descriptor)

    try:
        return per_second(synced, 100)
    finally:
        os.close(descriptor)


def append(log: AuditLog, count: int) -> None:
    """Append a batch in a transaction of its own."""
    with log.store.transaction() as conn:
        log.append_all(conn, [entry(number) for number in range(count)])


def appends(folder: Path, log: AuditLog, rounds: int) -> dict[str, Any]:
    """Measure the rates of appends and syncs in turns."""
    syncs: list[float] = []
    rates: dict[int, list[float]] = {count: [] for count in BATCHES}
    for _ in range(rounds):
        syncs.append(sync_rate(folder))
        for count, times in BATCHES.items():
            rates[count].append(count * per_second(lambda n=count: append(log, n), times))  # type: ignore[misc]
    log.verify()
    return {
        "syncs_per_s": [round(rate) for rate in syncs],
        "entries_per_s": {count: [round(r) for r in found] for count, found in rates.items()},
        "median_syncs_per_s": round(statistics.median(syncs)),
        "median_entries_per_s": {n: round(statistics.median(r)) for n, r in rates.items()},
    }


def proofs(log: AuditLog, size: int) -> dict[str, Any]:
    """Grow the log to `size` entries by large batches and time proofs of random entries."""
    head = log.check().size
    started = time.perf_counter()
    for start in range(head, size, LARGE_BATCH):
        append(log, min(LARGE_BATCH, size - start))
    build_s = time.perf_counter() - started
    times_ms = []
    for _ in range(200):
        index = secrets.randbelow(size)
        started = time.perf_counter()
        proof = prove(log, index)
        times_ms.append(1000 * (time.perf_counter() - started))
        verify_proof(proof, log.key.verifier)
    return {
        "entries": log.check().size,
        "appends_per_s_in_large_batches": round((size - head) / build_s),
        "median_proof_ms": round(statistics.median(times_ms), 2),
        "p99_proof_ms": round(statistics.quantiles(times_ms, n=100)[98], 2),
    }


def main() -> int:
    """Measure; exit status 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--database-url", help="a PostgreSQL database instead of a file")
    arguments = parser.parse_args()
    load = os.getloadavg()
    with (
        tempfile.TemporaryDirectory() as name,
        database(Path(name), arguments.database_url) as place,
    ):
        folder = Path(name)
        store = Store.open(place, KERNEL)
        log = AuditLog(store, NoteKey("llmos.local/bench", secrets.token_bytes(32)))
        result: dict[str, Any] = {
            "machine": {
                "platform": platform.platform(),
                "python": platform.python_version(),
                "cpus": os.cpu_count(),
                "database": type(store.database).__name__,
                "load_average": [round(value, 2) for value in load],
            },
            "appends": appends(folder, log, arguments.rounds),
            "proofs": proofs(log, arguments.entries),
        }
        store.close()
    largest = max(BATCHES)
    goal = min(GOAL_PER_S, GOAL_PER_SYNC * result["appends"]["median_syncs_per_s"])
    reached = result["appends"]["median_entries_per_s"][largest] >= goal
    quick = result["proofs"]["median_proof_ms"] < GOAL_PROOF_MS
    result["goals"] = {f"{goal} entries/s at batch {largest}": reached, "proof < 5 ms": quick}
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if reached and quick else 1


if __name__ == "__main__":
    sys.exit(main())
