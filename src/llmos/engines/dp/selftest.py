"""The engine's check of itself on the first real batch; a failure stops the job.

Silent faults are the common ones: adapters that train but change nothing, layers that autograd
passes by, a model whose output is not what the loss assumes. So the first step's gradients are
compared with ordinary autograd through the untouched model, two records one by one.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from llmos.engines.dp.sampling import TrainingRecord
from llmos.errors import SelfTestFailed
from llmos.models.lora import LoraAdapter

_TRIAL_STD: Final = 0.02  # of B during the check: at B = 0 the gradient of A is zero
_TOLERANCE: Final = {torch.bfloat16: 2e-2, torch.float16: 2e-2}  # relative; otherwise 1e-3
_DEFAULT_TOLERANCE: Final = 1e-3


def trial_weights(adapter: LoraAdapter) -> Tensor:
    """Return weights (P,) at which every parameter has a gradient; repeatable, not secret."""
    weights = adapter.vector()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(weights.shape, generator=generator).mul_(_TRIAL_STD)
    return weights + noise.to(weights.device)


def reference_gradient(adapter: LoraAdapter, record: TrainingRecord) -> Tensor:
    """Return one record's gradient (P,) by ordinary autograd through the whole model."""
    parameters = adapter.parameters()
    ids = torch.tensor([record.ids], device=parameters[0].device)  # (1, T)
    logits = adapter.model(input_ids=ids, use_cache=False).logits[0, record.labels_from - 1 : -1]
    exact = torch.promote_types(logits.dtype, torch.float32)
    loss = cross_entropy(logits.to(exact), ids[0, record.labels_from :])
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])


def compare(adapter: LoraAdapter, gradients: Tensor, records: list[TrainingRecord]) -> None:
    """Compare the engine's gradients (U, P) with the reference, unit by unit.

    Raises:
        SelfTestFailed: a norm differs by more than rounding can explain.
    """
    tolerance = _TOLERANCE.get(_base_dtype(adapter.model), _DEFAULT_TOLERANCE)
    for gradient, record in zip(gradients, records, strict=True):
        expected = reference_gradient(adapter, record).norm().item()
        found = gradient.norm().item()
        if not abs(found - expected) <= tolerance * expected:
            raise SelfTestFailed(
                f"a gradient's norm is {found:.6g}, ordinary autograd says {expected:.6g}",
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


def _base_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the frozen weights."""
    return next(p.dtype for p in model.parameters() if not p.requires_grad)
