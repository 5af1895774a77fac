"""Time and memory of one private training step against Hugging Face + PEFT without privacy.

Every arm is a process of its own, loaded once; the arms then take turns, one step each, so that
whatever else the machine does falls on all of them alike. Same batch, same adapter (rank 16 on
all linear layers), same optimizer. Memory is the peak above the loaded model. Opacus joins if it is
installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

Step = Callable[[], None]

ROWS, TOKENS, RANK = 8, 128, 16
ALPHA, RATE, CLIP_NORM, NOISE = 32, 1e-4, 1.0, 0.5
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {"all tokens are labels": 1, "first half is prompt": TOKENS // 2}  # -> first label
OURS, PEFT, PEFT_32 = "llmos dp", "peft, no privacy", "peft, no privacy, float32"
OPACUS, OPACUS_GHOST = "opacus dp", "opacus dp, ghost"
TARGET_RATIOS = {"all tokens are labels": (1.00, 0.80), "first half is prompt": (0.80, 0.70)}


@dataclass(frozen=True, slots=True)
class Measurement:
    """One arm in one case."""

    arm: str
    case: str
    seconds: tuple[float, ...]  # one a step
    cpu_s: tuple[float, ...]  # of all threads; steadier than seconds on a busy machine
    peak_mib: float  # above the loaded model

    @property
    def median_s(self) -> float:
        """Return the median step."""
        return statistics.median(self.seconds)


def load(folder: Path | None, dtype: torch.dtype) -> nn.Module:
    """Load a model, or draw one of the shape of SmolLM2-135M: weights do not change the work."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if folder is not None:
        loaded: nn.Module = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
        return loaded
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        tie_word_embeddings=True,
    )
    drawn: nn.Module = LlamaForCausalLM(config).to(dtype)
    return drawn


def batch() -> Tensor:
    """Return the token ids (ROWS, TOKENS) that every arm trains on."""
    return torch.randint(10, 49000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))


def run_ours(model: nn.Module, first_label: int, turn: Callable[[float], bool]) -> None:
    """Train through the public `fit`; all units are drawn in every step."""
    from llmos.engines.dp.plan import AdamWSettings, DPPlan, GaussianClipping, Performance
    from llmos.engines.dp.sampling import TrainingRecord
    from llmos.engines.dp.trainer import fit
    from llmos.models.lora import LoraConfig, attach

    adapter = attach(model, LoraConfig(rank=RANK, alpha=ALPHA))
    records = [TrainingRecord(i, tuple(row), first_label) for i, row in enumerate(batch().tolist())]
    plan = DPPlan(
        units=ROWS,
        expected_batch_units=ROWS,
        steps=1_000_000,
        privacy=GaussianClipping(CLIP_NORM, NOISE),
        optimizer=AdamWSettings(learning_rate=RATE),
    )
    going = [turn(0.0)]
    fit(
        adapter,
        records,
        plan,
        Performance(microbatch_tokens=ROWS * TOKENS),
        on_step=lambda report: going.append(turn(report.seconds)),
        stop=lambda: not going[-1],
    )


def run_peft(model: nn.Module, first_label: int, turn: Callable[[float], bool]) -> None:
    """Train as PEFT's documentation shows."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=RATE)
    ids, labels = batch(), batch()
    labels[:, :first_label] = -100

    def step() -> None:
        adapted(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    _turns(step, turn)


def run_opacus(
    model: nn.Module, first_label: int, turn: Callable[[float], bool], *, ghost: bool
) -> None:
    """Train with Opacus on PEFT's adapters: per-sample gradients, or ghost clipping."""
    from opacus import grad_sample, optimizers
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False).train()
    plain = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=RATE)
    common = {"max_grad_norm": CLIP_NORM, "loss_reduction": "sum"}
    noise = {"noise_multiplier": NOISE, "expected_batch_size": ROWS, **common}
    if ghost:
        wrapped = grad_sample.GradSampleModuleFastGradientClipping(
            adapted, batch_first=True, strict=False, use_ghost_clipping=True, **common
        )
        optimizer = optimizers.DPOptimizerFastGradientClipping(plain, **noise)
    else:
        wrapped = grad_sample.GradSampleModule(
            adapted, batch_first=True, strict=False, loss_reduction="sum"
        )
        optimizer = optimizers.DPOptimizer(plain, **noise)
    ids, labels = batch(), batch()
    labels[:, :first_label] = -100

    def step() -> None:
        logits = wrapped(input_ids=ids, use_cache=False).logits[:, :-1].float()
        per_label = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
        )
        per_row = per_label.view(ROWS, -1).sum(1) / (labels[:, 1:] >= 0).sum(1)
        if ghost:
            DPTensorFastGradientClipping(wrapped, optimizer, per_row, "sum").backward()
        else:
            per_row.sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    _turns(step, turn)


def _turns(step: Step, turn: Callable[[float], bool]) -> None:
    seconds = 0.0
    while turn(seconds):
        started = time.perf_counter()
        step()
        seconds = time.perf_counter() - started


def serve(arm: str, case: str, folder: Path | None, threads: int) -> None:
    """Run one arm: a step for each line that comes in, and its seconds and peak as answer."""
    torch.set_num_threads(threads)
    model = load(folder, torch.float32 if arm == PEFT_32 else torch.bfloat16)
    for parameter in model.parameters():
        parameter.sum()  # pages of the file come in now and count as loaded
    loaded_kib = _status_kib("VmRSS")
    cpu_s = time.process_time()

    def turn(seconds: float) -> bool:
        nonlocal cpu_s
        used_s, peak_mib = time.process_time() - cpu_s, (_status_kib("VmHWM") - loaded_kib) / 1024
        print(json.dumps({"seconds": seconds, "cpu_s": used_s, "peak_mib": peak_mib}), flush=True)
        going = sys.stdin.readline() == "step\n"
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (man 5 proc)
        cpu_s = time.process_time()
        return going

    runners: dict[str, Callable[[nn.Module, int, Callable[[float], bool]], None]] = {
        OURS: run_ours,
        PEFT: run_peft,
        PEFT_32: run_peft,
        OPACUS: lambda *args: run_opacus(*args, ghost=False),
        OPACUS_GHOST: lambda *args: run_opacus(*args, ghost=True),
    }
    runners[arm](model, CASES[case], turn)


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


@contextmanager
def arm_process(arm: str, case: str, options: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Start one arm and wait until it is loaded."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # noqa: TID251 - for the child
    command = [sys.executable, __file__, "--arm", arm, "--case", case, *options]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        _answer(process)
        yield process
    finally:
        process.terminate()
        process.communicate()


def _answer(process: subprocess.Popen[str]) -> dict[str, float]:
    assert process.stdout is not None
    answer: dict[str, float] = json.loads(process.stdout.readline())
    return answer


def _take_step(process: subprocess.Popen[str]) -> dict[str, float]:
    assert process.stdin is not None
    process.stdin.write("step\n")
    process.stdin.flush()
    return _answer(process)


def measure(arms: list[str], case: str, rounds: int, options: list[str]) -> list[Measurement]:
    """Let the arms take turns: one step to warm up, then `rounds` that count."""
    with ExitStack() as stack:
        processes = {arm: stack.enter_context(arm_process(arm, case, options)) for arm in arms}
        answers: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
        for round_number in range(rounds + 1):
            for arm in arms if round_number % 2 else reversed(arms):
                answers[arm].append(_take_step(processes[arm]))
    return [
        Measurement(
            arm=arm,
            case=case,
            seconds=tuple(answer["seconds"] for answer in answers[arm][1:]),
            cpu_s=tuple(answer["cpu_s"] for answer in answers[arm][1:]),
            peak_mib=max(answer["peak_mib"] for answer in answers[arm][1:]),
        )
        for arm in arms
    ]


def table(measurements: list[Measurement]) -> str:
    """Lay the figures out against PEFT's."""
    heads = ("median s", "ratio", "cpu s", "ratio", "MiB", "ratio")
    lines = [f"{'case':24}{'arm':28}" + "".join(f"{head:>9}" for head in heads)]
    for row in measurements:
        base = next(m for m in measurements if (m.arm, m.case) == (PEFT, row.case))
        cpu_s, base_cpu_s = statistics.median(row.cpu_s), statistics.median(base.cpu_s)
        figures = (
            *(row.median_s, row.median_s / base.median_s),
            *(cpu_s, cpu_s / base_cpu_s),
            *(row.peak_mib, row.peak_mib / base.peak_mib),
        )
        goal = ""
        if row.arm == OURS:
            goal = "  goal: time {:.2f}, memory {:.2f}".format(*TARGET_RATIOS[row.case])
        numbers = "".join(f"{figure:9.2f}" for figure in figures)
        lines.append(f"{row.case:24}{row.arm:28}{numbers}{goal}")
    return "\n".join(lines)


def as_json(measurements: list[Measurement], load_before: float) -> str:
    """Write down the figures and the machine they were taken on."""
    features = torch.cpu.get_capabilities()
    machine = {
        "cpu": features.get("cpu_name", platform.machine()),
        "cores": os.cpu_count(),
        "bfloat16_instructions": bool(features.get("avx512_bf16") or features.get("amx_bf16")),
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
        "torch": torch.__version__,
    }
    rows = [
        {
            "arm": row.arm,
            "case": row.case,
            "seconds": [round(second, 4) for second in row.seconds],
            "cpu_s": [round(second, 4) for second in row.cpu_s],
            "peak_mib": round(row.peak_mib, 1),
        }
        for row in measurements
    ]
    shape = {"rows": ROWS, "tokens": TOKENS, "rank": RANK}
    return json.dumps({"machine": machine, "batch": shape, "measurements": rows}, indent=2)


def main() -> None:
    """Measure all arms in all cases, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--model", type=Path, help="folder of a Llama-like model; default: random")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm is not None:
        serve(options.arm, options.case, options.model, options.threads)
        return
    load_before = os.getloadavg()[0]
    passed_on = ["--threads", str(options.threads)]
    passed_on += [] if options.model is None else ["--model", str(options.model)]
    arms = [OURS, PEFT, PEFT_32]
    arms += [OPACUS, OPACUS_GHOST] if find_spec("opacus") else []
    measurements = [row for case in CASES for row in measure(arms, case, options.rounds, passed_on)]
    print(table(measurements))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(as_json(measurements, load_before))


if __name__ == "__main__":
    main()
