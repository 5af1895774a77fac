"""The engine's check of itself on the first real batch; a failure stops the job.

Silent faults are the common ones: adapters that train but change nothing, layers that autograd
passes by, a model whose output is not what the loss assumes. So the first step's gradients are
compared with ordinary autograd through the untouched model, two records one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from llmos.engines.dp.sampling import TrainingRecord
from llmos.errors import SelfTestFailed
from llmos.models.lora import LoraAdapter

_TRIAL_STD: Final = 0.02  # of B during the check: at B = 0 the gradient of A is zero
# Relative error of gradient norms and losses. In bfloat16 two correct ways to compute a gradient of
# a deep model differ in norm by up to 7 % (30 blocks, measured), in loss by far less.
_NORM_TOLERANCE: Final = {torch.bfloat16: 0.15, torch.float16: 0.15}
_LOSS_TOLERANCE: Final = {torch.bfloat16: 2e-2, torch.float16: 2e-2}
_DEFAULT_TOLERANCE: Final = 1e-3  # in float32 and better


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """One record by ordinary autograd through the whole untouched model."""

    loss: float
    gradient: Tensor  # (P,)


def trial_weights(adapter: LoraAdapter) -> Tensor:
    """Return weights (P,) at which every parameter has a gradient; repeatable, not secret."""
    weights = adapter.vector()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(weights.shape, generator=generator).mul_(_TRIAL_STD)
    return weights + noise.to(weights.device)


def reference(adapter: LoraAdapter, record: TrainingRecord) -> Reference:
    """Compute one record's loss and gradient without any of the engine's code."""
    parameters = adapter.parameters()
    ids = torch.tensor([record.ids], device=parameters[0].device)  # (1, T)
    logits = adapter.model(input_ids=ids, use_cache=False).logits[0, record.labels_from - 1 : -1]
    exact = torch.promote_types(logits.dtype, torch.float32)
    loss = cross_entropy(logits.to(exact), ids[0, record.labels_from :])
    gradients = torch.autograd.grad(loss, parameters)
    return Reference(loss.item(), torch.cat([part.flatten() for part in gradients]))


def compare(
    adapter: LoraAdapter, gradients: Tensor, losses: Tensor, records: list[TrainingRecord]
) -> None:
    """Compare the engine's gradients (U, P) and losses (U,) with the reference, one by one.

    Raises:
        SelfTestFailed: a loss or norm differs by more than rounding can explain.
    """
    dtype = next(iter(adapter.layers.values())).weight.dtype
    for gradient, loss, record in zip(gradients, losses.tolist(), records, strict=True):
        expected = reference(adapter, record)
        _agree("loss", loss, expected.loss, _LOSS_TOLERANCE.get(dtype, _DEFAULT_TOLERANCE))
        norms = gradient.norm().item(), expected.gradient.norm().item()
        _agree("gradient norm", *norms, _NORM_TOLERANCE.get(dtype, _DEFAULT_TOLERANCE))


def _agree(what: str, found: float, expected: float, tolerance: float) -> None:
    if not abs(found - expected) <= tolerance * expected:
        raise SelfTestFailed(
            f"a record's {what} is {found:.6g}, ordinary autograd says {expected:.6g}",
            hint="the engine does not compute this model correctly; do not train it privately",
        )


def check_update(before: Tensor, after: Tensor) -> None:
    """Refuse an update that left the weights as they were or made them useless.

    Raises:
        SelfTestFailed: no weight moved, or one is not finite.
    """
    if not bool(after.isfinite().all()):
        raise SelfTestFailed("the first step made weights that are not finite numbers")
    if torch.equal(before, after):
        raise SelfTestFailed("the first step changed no weight")
