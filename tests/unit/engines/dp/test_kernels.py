"""Fused operations against the layers they stand in for."""

from __future__ import annotations

import pytest
import torch
from tests.unit.engines.dp.conftest import MakeAdapter, tiny_llama
from torch import Tensor, nn
from torch.autograd import gradcheck

from llmos.engines.dp import kernels
from llmos.engines.dp.kernels import Fusion, Scratch, apply, product_dtype

IDS = torch.tensor([[5, 8, 13, 21, 34]])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-6), (torch.bfloat16, 3e-2)]
)
def test_fusion_changes_no_output(dtype: torch.dtype, tolerance: float) -> None:
    model = tiny_llama(dtype)
    with torch.no_grad():
        plain = model(input_ids=IDS).logits.double()
        with Fusion.of(model).active():
            fused = model(input_ids=IDS).logits.double()
        again = model(input_ids=IDS).logits.double()
    assert (fused - plain).norm() <= tolerance * plain.norm()
    assert torch.equal(again, plain)


def test_norms_mlps_and_linear_layers_are_recognised(make_adapter: MakeAdapter) -> None:
    model = make_adapter(targets=("q_proj", "down_proj")).model
    kinds = [type(module).__name__ for module, _ in Fusion.of(model).forwards]
    assert kinds.count("LlamaRMSNorm") == 5
    assert kinds.count("LlamaMLP") == 2
    assert kinds.count("Linear") == 2 * 7 + 1


class ShiftedNorm(nn.Module):
    """Has the parts of a root-mean-square norm, but multiplies by 1 + weight, as Gemma does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return x * scale * (1 + self.weight)


class GeluMLP(nn.Module):
    """Has the parts of a gated MLP with another activation."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 12), nn.Linear(8, 12)
        self.down_proj, self.act_fn = nn.Linear(12, 8), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


@pytest.mark.parametrize("stranger", [ShiftedNorm, GeluMLP])
def test_a_layer_that_only_looks_alike_is_left_alone(stranger: type[nn.Module]) -> None:
    module = stranger()
    assert module not in [found for found, _ in Fusion.of(module).forwards]


def test_gradients_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    weight = draw(5).detach()
    linear = nn.Linear(5, 4).double().requires_grad_(requires_grad=False)
    assert gradcheck(lambda x: apply(kernels._FrozenRmsNorm, x, weight, 1e-5), draw(2, 3, 5))
    assert gradcheck(lambda gate, up: apply(kernels._Gate, gate, up), (draw(3, 4), draw(3, 4)))
    assert gradcheck(lambda x: apply(kernels._FrozenProduct, x, linear), draw(2, 3, 5))


def test_bfloat16_is_widened_only_where_it_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, dtype=torch.bfloat16)
    for emulated, expected in ((True, torch.float32), (False, torch.bfloat16)):
        monkeypatch.setattr(kernels, "emulates_bfloat16", lambda answer=emulated: answer)
        assert product_dtype(x) is expected
        assert product_dtype(x.double()) is torch.float64


def test_scratch_is_reused_and_never_given_away() -> None:
    scratch = Scratch()
    wide = scratch.widen("a", torch.ones(2, 3, dtype=torch.bfloat16), torch.float32)
    narrow = scratch.widen("a", torch.zeros(4, dtype=torch.bfloat16), torch.float32)
    assert narrow.data_ptr() == wide.data_ptr()
    same = torch.ones(2)
    assert scratch.widen("a", same, torch.float32) is same
    a, b = torch.rand(2, 3), torch.rand(3, 4)
    kept = scratch.product("p", a, b, torch.float32)
    lent = scratch.product("p", a, b, torch.bfloat16)
    again = scratch.product("p", a, b, torch.bfloat16)
    assert lent.data_ptr() == again.data_ptr() != kept.data_ptr()
    assert torch.equal(kept, lent)
