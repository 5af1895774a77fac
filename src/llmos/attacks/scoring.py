"""One teacher-forced pass over records: what every attack here needs, and no sampling."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from llmos.attacks.scores import Scores
from llmos.errors import MeasurementError
from llmos.models.prefix import Prefix

CHUNK_ROWS: Final = 256  # label positions whose logits are held in float32 at one time


class EncodedRecord(Protocol):
    """Token ids of a record, of which those from `labels_from` on are to be predicted."""

    @property
    def ids(self) -> tuple[int, ...]:
        """The whole record's tokens."""

    @property
    def labels_from(self) -> int:
        """Index of the first predicted token, at least 1."""


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and afterwards give each module its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():  # inference_mode would leave tensors behind that training cannot use
            yield
    finally:
        for module, training in modes:
            module.training = training


def _batches(records: Sequence[EncodedRecord], batch_tokens: int) -> Iterator[list[int]]:
    """Cut the records, sorted by length, into batches of at most `batch_tokens` padded tokens."""
    order = sorted(
        range(len(records)), key=lambda i: (len(records[i].ids), records[i].labels_from, i)
    )
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * len(records[i].ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _label_logits(
    model: nn.Module,
    entering: dict[str, Tensor],
    attention_mask: Tensor,
    labels: Tensor,
    *,
    slices: bool,
) -> Tensor:
    """Return the logits that predict the tokens at `labels`, a (B, T) mask, as (labels, V)."""
    arguments: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": False}
    positions = labels[:, 1:].any(dim=0).nonzero().squeeze(1)  # (P,) where any row has a label
    if slices:
        arguments["logits_to_keep"] = positions
    logits: Tensor = model(**entering, **arguments).logits
    if not slices:
        logits = logits[:, positions]
    return logits[labels[:, 1:][:, positions]]


def _score_batch(
    model: nn.Module,
    records: Sequence[EncodedRecord],
    batch: Sequence[int],
    prefix: Prefix | None,
    *,
    slices: bool,
) -> tuple[list[float], list[int]]:
    """Return loss and exact-prefix length of each record of one right-padded batch."""
    device = next(model.parameters()).device
    width = max(len(records[number].ids) for number in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)  # (B, T)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    labels = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, record in enumerate(records[number] for number in batch):
        length = len(record.ids)
        ids[row, :length] = torch.tensor(record.ids)
        mask[row, :length] = 1
        labels[row, record.labels_from : length] = True
    ids, mask, labels = ids.to(device), mask.to(device), labels.to(device)
    entering = {"input_ids": ids} if prefix is None else {"inputs_embeds": prefix.entering(batch)}
    logits = _label_logits(model, entering, mask, labels, slices=slices)
    targets = ids[labels]
    losses, hits = [], []
    for start in range(0, len(targets), CHUNK_ROWS):
        rows, wanted = logits[start : start + CHUNK_ROWS].float(), targets[start:][:CHUNK_ROWS]
        losses.append(cross_entropy(rows, wanted, reduction="none"))
        hits.append(rows.argmax(dim=-1) == wanted)
    counts = labels.sum(dim=1).tolist()
    per_record = torch.split(torch.cat(losses).double().cpu(), counts)
    right = torch.split(torch.cat(hits).long().cpu(), counts)
    return (
        [float(loss.sum()) for loss in per_record],
        [int(hit.cumprod(dim=0).sum()) for hit in right],
    )


def score(
    model: nn.Module,
    records: Sequence[EncodedRecord],
    *,
    prefix: Prefix | None = None,
    batch_tokens: int = 2048,
) -> Scores:
    """Score each record once with teacher forcing; logits are made at label positions only.

    Args:
        model: a Hugging Face causal language model; its mode is restored afterwards.
        records: right-padded together in batches sorted by length.
        prefix: of these records: the blocks below it are not run again.
        batch_tokens: most padded tokens in one forward pass; a longer record goes alone.

    Raises:
        MeasurementError: a record has nothing to predict, or no token to predict it from.
    """
    for number, record in enumerate(records):
        if not 1 <= record.labels_from < len(record.ids):
            raise MeasurementError(
                f"record {number} has {len(record.ids)} tokens and labels from "
                f"{record.labels_from}: nothing can be predicted"
            )
    slices = "logits_to_keep" in inspect.signature(model.forward).parameters
    losses = np.zeros(len(records))
    prefixes = np.zeros(len(records), dtype=np.int64)
    with _evaluating(model), nullcontext() if prefix is None else prefix.rest():
        for batch in _batches(records, batch_tokens):
            losses[batch], prefixes[batch] = _score_batch(
                model, records, batch, prefix, slices=slices
            )
    tokens = np.array([len(record.ids) - record.labels_from for record in records], dtype=np.int64)
    return Scores(losses, tokens, prefixes)
