"""The engine's check of itself."""

from __future__ import annotations

import pytest
import torch
from tests.unit.engines.dp.conftest import MakeAdapter, make_records
from torch import Tensor

from llmos.engines.dp import selftest
from llmos.errors import SelfTestFailed
from llmos.models.lora import LoraAdapter, Parametrisation

RECORDS = make_records([12, 9], [0, 1])


def truth(adapter: LoraAdapter) -> tuple[Tensor, Tensor]:
    references = [selftest.reference(adapter, record) for record in RECORDS]
    gradients = torch.stack([reference.gradient for reference in references])
    return gradients, torch.tensor([reference.loss for reference in references])


def test_agreement_passes(make_adapter: MakeAdapter) -> None:
    adapter = make_adapter()
    selftest.compare(adapter, *truth(adapter), RECORDS)


@pytest.mark.parametrize(
    ("dtype", "fault"), [(torch.float32, 1.003), (torch.bfloat16, 1.2), (torch.bfloat16, 0.8)]
)
def test_a_wrong_gradient_is_found(
    make_adapter: MakeAdapter, dtype: torch.dtype, fault: float
) -> None:
    adapter = make_adapter(dtype)
    gradients, losses = truth(adapter)
    gradients[1] *= fault
    with pytest.raises(SelfTestFailed, match="gradient norm"):
        selftest.compare(adapter, gradients, losses, RECORDS)


@pytest.mark.parametrize("fault", [0.97, 1.03, float("nan")])
def test_a_wrong_loss_is_found_even_in_bfloat16(make_adapter: MakeAdapter, fault: float) -> None:
    adapter = make_adapter(torch.bfloat16)
    gradients, losses = truth(adapter)
    with pytest.raises(SelfTestFailed, match="loss"):
        selftest.compare(adapter, gradients, losses * fault, RECORDS)


@pytest.mark.parametrize("kind", Parametrisation)
def test_every_parameter_has_a_gradient_at_the_trial_weights(
    make_adapter: MakeAdapter, kind: Parametrisation
) -> None:
    adapter = make_adapter(parametrisation=kind)
    for layer in adapter.layers.values():
        layer.trained[-1].data.zero_()
    adapter.load_vector(selftest.trial_weights(adapter))
    gradient = selftest.reference(adapter, RECORDS[0]).gradient
    assert bool((gradient != 0).double().mean() > 0.99)


def test_first_update_has_to_move_finite_weights() -> None:
    selftest.check_update(torch.zeros(3), torch.ones(3))
    with pytest.raises(SelfTestFailed, match="changed no weight"):
        selftest.check_update(torch.zeros(3), torch.zeros(3))
    with pytest.raises(SelfTestFailed, match="not finite"):
        selftest.check_update(torch.zeros(3), torch.tensor([0, 1, float("nan")]))
