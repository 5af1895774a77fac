"""How long a training will take: from an earlier run like it, else from a short measurement."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from llmos.data.datasets import DatasetCard
from llmos.data.records import RecordFormat
from llmos.engines.dp import prefix
from llmos.engines.dp.plan import Performance
from llmos.jobs.jobs import JobState
from llmos.models.devices import compute_dtype, resolve_device
from llmos.models.registry import ModelEntry
from llmos.workflows.parts import Parts

if TYPE_CHECKING:
    from llmos.workflows.training_request import TrainRequest

# English clinical text under SmolLM2's tokenizer has about 3.5 characters a token.
_CHARACTERS_PER_TOKEN: Final = 3.5
_CHAT_TEMPLATE_TOKENS: Final = 30
# Share of a plain matrix product's speed that a whole training step reaches (two-core CPU).
_STEP_EFFICIENCY: Final = 0.55
_BLOCK_PASSES: Final = 2.3  # forward once, backward without the frozen weights' gradients
_LABELS_AFTER_PROMPT: Final = 0.1
_PROBE_S: Final = 0.1
_PROBES: Final = 5  # the fastest counts: others may use the machine too
_START_S: Final = 10.0  # loading the model, encoding, the engine's self-test


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds and what they rest on."""

    seconds: float
    basis: str

    def __str__(self) -> str:
        """Return minutes and seconds with the basis."""
        minutes, seconds = divmod(round(self.seconds), 60)
        return f"about {minutes} min {seconds:02d} s ({self.basis})"


def predict_seconds(
    request: TrainRequest, card: DatasetCard, base: ModelEntry, parts: Parts
) -> Prediction:
    """Predict the wall time of a training on this machine."""
    per_record = min(
        request.max_tokens,
        card.characters / max(1, card.records) / _CHARACTERS_PER_TOKEN
        + (1 if card.format is RecordFormat.TEXT else _CHAT_TEMPLATE_TOKENS),
    )
    records_per_unit = min(request.max_records_per_unit, card.records / card.units)
    tokens = request.steps * request.batch * records_per_unit * per_record
    if (speed := _earlier_speed(request, parts)) is not None:
        return Prediction(_START_S + tokens / speed, f"{speed:.0f} tokens/s in an earlier run")
    settings = parts.kernel.config
    device = resolve_device(settings.device)
    flops_per_s = matmul_flops_per_s(device) * _STEP_EFFICIENCY
    config = json.loads((settings.home / base.location / "config.json").read_bytes())
    speed = flops_per_s / _flops_per_token(request, config, text=card.format is RecordFormat.TEXT)
    each_bytes = int(config["hidden_size"]) * compute_dtype(device).itemsize
    own_tokens = card.characters / _CHARACTERS_PER_TOKEN  # a shared beginning is run once in all
    kept = prefix.pays(
        int(card.records * per_record * each_bytes),
        request.steps * request.batch / request.units,
        Performance(),
    )
    frozen_flops = _frozen_flops_per_token(request, config) * (own_tokens if kept else tokens)
    seconds = _START_S + frozen_flops / flops_per_s + tokens / speed
    return Prediction(seconds, f"estimated at {speed:.0f} tokens/s")


def _earlier_speed(request: TrainRequest, parts: Parts) -> float | None:
    """Return the speed of the newest finished job with the same model and adapter shape."""
    for job in parts.jobs.jobs():
        same = all(
            job.request.get(name) == getattr(request, name)
            for name in ("model", "rank", "last_layers")
        )
        if job.state is JobState.DONE and same and job.result and job.result.get("tokens_per_s"):
            return float(job.result["tokens_per_s"])
    return None


def _flops_per_token(request: TrainRequest, config: dict[str, Any], *, text: bool) -> float:
    """Count multiplications and additions of a token in the adapted blocks and the head.

    The head runs at label positions: everywhere in plain text, rarely after a prompt.
    """
    head = int(config["vocab_size"]) * int(config["hidden_size"])
    labels = 1.0 if text else _LABELS_AFTER_PROMPT
    adapted = _adapted_blocks(request, config)
    return 2.0 * (_BLOCK_PASSES * adapted * _block_parameters(config) + 2 * labels * head)


def _frozen_flops_per_token(request: TrainRequest, config: dict[str, Any]) -> float:
    """Count those of the blocks below the adapter, which only run forward."""
    frozen = int(config["num_hidden_layers"]) - _adapted_blocks(request, config)
    return 2.0 * frozen * _block_parameters(config)


def _adapted_blocks(request: TrainRequest, config: dict[str, Any]) -> int:
    layers = int(config["num_hidden_layers"])
    return min(request.last_layers or layers, layers)


def _block_parameters(config: dict[str, Any]) -> int:
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    heads = int(config["num_attention_heads"])
    shared = int(config.get("num_key_value_heads") or heads) / heads
    return int(hidden * hidden * (2 + 2 * shared)) + 3 * hidden * inner


def matmul_flops_per_s(device: torch.device) -> float:
    """Measure a matrix product of a small model's size and dtype, for about half a second."""
    matrix = torch.ones(1024, 1024, dtype=compute_dtype(device), device=device)
    float(torch.mm(matrix, matrix)[0, 0])
    fastest = 0.0
    for _ in range(_PROBES):
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < _PROBE_S:
            float(torch.mm(matrix, matrix)[0, 0])  # reading a value waits for the device
            count += 1
        fastest = max(fastest, count * 2 * 1024**3 / (time.perf_counter() - start))
    return fastest
