"""Next-token loss at label positions only, without ever holding all logits.

The head is frozen, so softmax, cross entropy and the gradient of the hidden states are computed
together in the forward pass, a few rows at a time; no logits exist for prompt and padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.autograd import Function

from llmos.engines.dp.kernels import Context, apply, product_dtype
from llmos.engines.dp.sampling import Microbatch, TrainingRecord
from llmos.errors import UnsupportedModel

_LOGITS: Final = 1 << 23  # that exist at the same time
_VOCABULARY_BLOCK: Final = 1 << 13  # rows of the head that are widened at the same time


@dataclass(frozen=True, slots=True, eq=False)
class LanguageModel:
    """The two parts of a Hugging Face causal language model that the loss needs."""

    body: nn.Module  # input_ids (R, T) -> last_hidden_state (R, T, d)
    head: nn.Linear  # hidden states (., d) -> logits (., V)

    @classmethod
    def of(cls, model: nn.Module) -> LanguageModel:
        """Find the parts of `model`.

        Raises:
            UnsupportedModel: it is no causal language model with a linear head.
        """
        body = getattr(model, "base_model", None)
        outputs = getattr(model, "get_output_embeddings", None)
        head = None if outputs is None else outputs()
        if not isinstance(body, nn.Module) or body is model or not isinstance(head, nn.Linear):
            raise UnsupportedModel(f"{type(model).__name__} has no body and linear head")
        return cls(body, head)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One microbatch as tensors: R rows of T tokens with N labels."""

    ids: Tensor  # (R, T), padded on the right
    row: Tensor  # (N,) row of each label
    position: Tensor  # (N,) position of the hidden state that predicts it
    label: Tensor  # (N,)
    weight: Tensor  # (N,) of its loss in its unit's loss
    row_weight: Tensor  # (N,) of its loss in its record's loss
    unit_of_row: Tensor  # (R,)
    units: int

    @property
    def tokens(self) -> int:
        """Return how many tokens go through the model, padding included."""
        return self.ids.numel()


def collate(records: Sequence[TrainingRecord], microbatch: Microbatch, device: str) -> Batch:
    """Pad a microbatch's records on the right and list their labels.

    The loss of a unit is the mean over its records here of the mean loss of each record's labels.
    Attention is causal, so that no label ever sees the padding behind it, and no mask is needed.
    """
    chosen = [records[position] for position in microbatch.records]
    counts = torch.tensor([len(record.ids) - record.labels_from for record in chosen])
    width = max(len(record.ids) for record in chosen)
    ids = torch.tensor([record.ids + (0,) * (width - len(record.ids)) for record in chosen])
    row = torch.arange(len(chosen)).repeat_interleave(counts)
    position = torch.cat([torch.arange(r.labels_from, len(r.ids)) for r in chosen]) - 1
    unit_of_row = torch.tensor(microbatch.unit_of_row)
    rows_of_unit = torch.bincount(unit_of_row, minlength=microbatch.units)
    row_weight = counts.reciprocal()[row]
    return Batch(
        ids=ids.to(device),
        row=row.to(device),
        position=position.to(device),
        label=ids[row, position + 1].to(device),
        weight=(row_weight / rows_of_unit[unit_of_row[row]]).to(device),
        row_weight=row_weight.to(device),
        unit_of_row=unit_of_row.to(device),
        units=microbatch.units,
    )


def losses(model: LanguageModel, batch: Batch, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum over units of their losses, to differentiate, and each record's loss (R,)."""
    selected = hidden[batch.row, batch.position]  # (N, d)
    objective, per_label = apply(_LabelLoss, selected, model.head, batch.label, batch.weight)
    per_record = torch.zeros(len(batch.ids), device=hidden.device)
    per_record.index_add_(0, batch.row, per_label.detach() * batch.row_weight)
    return objective, per_record


class _LabelLoss(Function):
    """Weighted cross entropy of a frozen head; the gradient is ready when forward returns."""

    @staticmethod
    def forward(
        ctx: Context, hidden: Tensor, head: nn.Linear, label: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(hidden)
        per_label = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        rows = max(1, _LOGITS // head.out_features)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            per_label[part], gradient[part] = _cross_entropy(
                hidden[part], head, label[part], weight[part]
            )
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(per_label)
        return (per_label * weight).sum(), per_label

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None, None


def _cross_entropy(
    hidden: Tensor, head: nn.Linear, label: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Return each label's cross entropy (n,) and the weighted gradient (n, d) of `hidden`."""
    target = label[:, None]
    logits = _logits(hidden, head)  # (n, V)
    largest = logits.amax(1, keepdim=True)
    at_label = logits.gather(1, target)
    softmax = logits.sub_(largest).exp_()
    total = softmax.sum(1, keepdim=True)
    per_label = (largest + total.log() - at_label).squeeze(1)
    softmax.mul_(weight[:, None] / total)
    softmax.scatter_add_(1, target, -weight[:, None].to(softmax.dtype))
    return per_label, _backward(softmax, head, hidden)


def _logits(hidden: Tensor, head: nn.Linear) -> Tensor:
    """Return logits (n, V) in float32 or better, multiplied in `product_dtype`."""
    wide = product_dtype(hidden)
    exact = torch.promote_types(wide, torch.float32)
    logits = torch.empty(len(hidden), head.out_features, dtype=exact, device=hidden.device)
    x = hidden.to(wide)
    for block in _vocabulary(head, wide):
        logits[:, block] = x @ head.weight[block].to(wide).T
    return logits if head.bias is None else logits.add_(head.bias)


def _backward(g: Tensor, head: nn.Linear, hidden: Tensor) -> Tensor:
    """Return the gradient (n, d) of the hidden states from that of the logits (n, V)."""
    wide = product_dtype(hidden)
    result = torch.zeros(len(g), head.in_features, dtype=wide, device=g.device)
    for block in _vocabulary(head, wide):
        result.addmm_(g[:, block].to(wide), head.weight[block].to(wide))
    return result


def _vocabulary(head: nn.Linear, wide: torch.dtype) -> list[slice]:
    """Cut the vocabulary into blocks if the head has to be widened, else leave it whole."""
    size = head.out_features
    step = size if head.weight.dtype == wide else _VOCABULARY_BLOCK
    return [slice(start, start + step) for start in range(0, size, step)]
