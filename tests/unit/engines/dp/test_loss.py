"""The loss head in pieces against PyTorch's in one piece."""

from __future__ import annotations

import pytest
import torch
from tests.unit.engines.dp.conftest import tiny_llama
from torch import nn
from torch.nn.functional import cross_entropy

from llmos.engines.dp import loss
from llmos.engines.dp.kernels import apply
from llmos.engines.dp.loss import LanguageModel, collate
from llmos.engines.dp.sampling import Microbatch, TrainingRecord
from llmos.errors import UnsupportedModel


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("logits", [1, 40, 1 << 23])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pieces_give_loss_and_gradient_of_the_whole(
    dtype: torch.dtype, logits: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "_LOGITS", logits)
    monkeypatch.setattr(loss, "_VOCABULARY_BLOCK", 6)
    torch.manual_seed(0)
    head = nn.Linear(7, 20, bias=bias).to(dtype).requires_grad_(requires_grad=False)
    hidden = torch.randn(9, 7, dtype=dtype, requires_grad=True)
    label, weight = torch.randint(0, 20, (9,)), torch.rand(9)
    objective, per_label = apply(loss._LabelLoss, hidden, head, label, weight)
    (3 * objective).backward()
    exact = hidden.detach().double().requires_grad_()
    head_64 = nn.Linear(7, 20, bias=bias).double()
    head_64.load_state_dict({k: v.double() for k, v in head.state_dict().items()})
    expected = cross_entropy(head_64(exact), label, reduction="none")
    (3 * (expected * weight).sum()).backward()  # type: ignore[no-untyped-call]
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(per_label.double(), expected, rtol=tolerance, atol=tolerance)
    assert exact.grad is not None
    assert hidden.grad is not None
    error = (hidden.grad.double() - exact.grad).norm()
    assert error <= tolerance * exact.grad.norm()


def test_collate_lists_labels_only_and_weighs_records_within_their_unit() -> None:
    records = [
        TrainingRecord("a", (1, 2, 3, 4), 2),
        TrainingRecord("b", (5, 6), 1),
        TrainingRecord("a", (7, 8, 9), 2),
    ]
    batch = collate(records, Microbatch((0, 2, 1), (0, 0, 1), 2), "cpu")
    assert batch.ids.tolist() == [[1, 2, 3, 4], [7, 8, 9, 0], [5, 6, 0, 0]]
    assert batch.label.tolist() == [3, 4, 9, 6]
    assert list(zip(batch.row.tolist(), batch.position.tolist(), strict=True)) == [
        (0, 1),
        (0, 2),
        (1, 1),
        (2, 0),
    ]
    assert batch.row_weight.tolist() == [0.5, 0.5, 1, 1]
    assert batch.weight.tolist() == [0.25, 0.25, 0.5, 1]
    assert batch.tokens == 12


def test_a_model_without_a_linear_head_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="Linear"):
        LanguageModel.of(nn.Linear(2, 2))
    model = tiny_llama()
    model.set_output_embeddings(nn.Identity())  # type: ignore[operator]
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM"):
        LanguageModel.of(model)
