"""A training state as bytes (safetensors), tied to the plan under which it was made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import safetensors.torch
import torch
from safetensors import SafetensorError

from llmos.engines.dp.optimizer import TrainingState
from llmos.engines.dp.plan import DPPlan
from llmos.errors import EngineError

_TENSORS: Final = {"weights", "first_moment", "second_moment", "step", "plan", "self_tested"}


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """How far a run had come."""

    state: TrainingState
    self_tested: bool  # whether its gradients had been compared with autograd's


def encode(state: TrainingState, plan: DPPlan, *, self_tested: bool) -> bytes:
    """Write a state; the run's random key is not part of it."""
    return safetensors.torch.save(
        {
            "weights": state.weights.cpu(),
            "first_moment": state.first_moment.cpu(),
            "second_moment": state.second_moment.cpu(),
            "step": torch.tensor(state.step),
            "plan": torch.tensor(list(bytes.fromhex(plan.digest())), dtype=torch.uint8),
            "self_tested": torch.tensor(self_tested),
        }
    )


def decode(checkpoint: bytes, plan: DPPlan, *, parameters: int, device: str) -> Checkpoint:
    """Read a state back.

    Raises:
        EngineError: it is unreadable, or was made under another plan or for another adapter.
    """
    try:
        tensors = safetensors.torch.load(checkpoint)
    except SafetensorError as error:
        raise EngineError(f"the checkpoint cannot be read: {error}") from error
    if set(tensors) != _TENSORS or bytes(tensors["plan"].tolist()).hex() != plan.digest():
        raise EngineError(
            "the checkpoint was made under another plan",
            hint="a run goes on only under the plan that was charged; start a new one",
        )
    vectors = [tensors[name] for name in ("weights", "first_moment", "second_moment")]
    if any(v.shape != (parameters,) or v.dtype != torch.float32 for v in vectors):
        raise EngineError("the checkpoint belongs to an adapter of another shape")
    state = TrainingState(int(tensors["step"]), *(vector.to(device) for vector in vectors))
    return Checkpoint(state, bool(tensors["self_tested"]))
