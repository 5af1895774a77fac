"""The frozen factors of an SB adapter: exact, the same everywhere, and of a sensible size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.linalg import eigh
from torch import Tensor

from llmos.models.subspace import frozen_factors, top_subspace

SHAPES = pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])


def weight(*shape: int) -> Tensor:
    """Return a weight that bfloat16 holds exactly, with a spectrum that falls."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(*shape, generator=generator) * torch.linspace(2, 0.1, shape[1])
    return drawn.bfloat16().float()


@SHAPES
def test_it_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    w = weight(*shape)
    u, v = top_subspace(w, 5)
    for basis in (u, v):
        torch.testing.assert_close(basis.T @ basis, torch.eye(5).double(), atol=1e-10, rtol=0)
    expected_u, singular, expected_v = torch.linalg.svd(w.double(), full_matrices=False)
    found = u @ (u.T @ w.double() @ v) @ v.T
    best = expected_u[:, :5] @ singular[:5].diag() @ expected_v[:5]
    torch.testing.assert_close(found, best, atol=1e-10, rtol=0)


@SHAPES
def test_dtype_and_the_solver_s_signs_change_nothing(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    w = weight(*shape)
    usual = frozen_factors(w, 5)
    unrounded = w * (1 + 2.0**-12)  # a float32 checkpoint that one site loads in bfloat16
    for other in (w.bfloat16(), w.double(), unrounded):
        assert all(map(torch.equal, frozen_factors(other, 5), usual))

    def flipped(*arguments: Any, **options: Any) -> tuple[Any, Any]:
        values, vectors = eigh(*arguments, **options)
        return values, vectors * [1, -1, 1, -1, 1]

    monkeypatch.setattr("llmos.models.subspace.eigh", flipped)
    assert all(map(torch.equal, frozen_factors(w, 5), usual))


@SHAPES
@pytest.mark.parametrize("rank", [3, 12])
def test_an_adam_step_moves_the_weight_as_far_as_in_lora(shape: tuple[int, int], rank: int) -> None:
    """Adam's first step changes every entry of R by the rate, in LoRA every entry of B."""
    generator = torch.Generator().manual_seed(1)
    a, b = frozen_factors(weight(*shape), rank)
    signs = torch.randn(rank, rank, generator=generator).sign().double()
    moved = (b @ signs @ a).norm()
    lora_a = torch.empty(rank, shape[1])
    torch.nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5), generator=generator)
    lora_moved = (torch.randn(shape[0], rank, generator=generator).sign() @ lora_a).norm()
    assert moved.item() == pytest.approx(lora_moved.item(), rel=0.15)
