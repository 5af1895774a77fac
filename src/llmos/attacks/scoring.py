"""One teacher-forced pass over records: what every attack here needs, and no sampling."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from llmos.errors import MeasurementError

CHUNK_ROWS: Final = 256  # label positions whose logits are held in float32 at one time


class EncodedRecord(Protocol):
    """Token ids of a record, of which those from `labels_from` on are to be predicted."""

    @property
    def ids(self) -> tuple[int, ...]:
        """The whole record's tokens."""

    @property
    def labels_from(self) -> int:
        """Index of the first predicted token, at least 1."""


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """One row per record, in the order in which the records were given."""

    loss_nats: NDArray[np.float64]  # (n,) summed over the record's labels
    tokens: NDArray[np.int64]  # (n,) labels
    exact_prefix: NDArray[np.int64]  # (n,) leading labels that greedy decoding gives back

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.tokens)

    @property
    def exact(self) -> NDArray[np.bool_]:
        """(n,) whether greedy decoding after the prompt gives back every label.

        The first token on which greedy decoding leaves the record is the first whose teacher-forced
        argmax differs, so this equals generation without generating.
        """
        return np.equal(self.exact_prefix, self.tokens)

    @property
    def mean_loss_nats(self) -> NDArray[np.float64]:
        """(n,) loss per label."""
        return self.loss_nats / self.tokens

    @property
    def loss_per_token(self) -> float:
        """Loss over all labels of all records, in nats."""
        if not len(self):
            raise MeasurementError("no records to measure on")
        return float(self.loss_nats.sum() / self.tokens.sum())

    def prefix_match_rate(self, lengths: Sequence[int]) -> float:
        """Return the share of records whose first `lengths[i]` labels are all given back.

        Raises:
            MeasurementError: not one length per record, or a length outside 1..labels.
        """
        wanted = np.asarray(lengths, dtype=np.int64)
        if wanted.shape != self.tokens.shape or not len(self):
            raise MeasurementError(f"{len(lengths)} prefix lengths for {len(self)} records")
        if (wanted < 1).any() or (wanted > self.tokens).any():
            raise MeasurementError("a prefix length lies outside its record")
        return float((self.exact_prefix >= wanted).mean())

    def select(self, rows: NDArray[np.bool_]) -> Scores:
        """Return the rows where `rows` is true."""
        return Scores(self.loss_nats[rows], self.tokens[rows], self.exact_prefix[rows])


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
    model: nn.Module, ids: Tensor, attention_mask: Tensor, labels: Tensor, *, slices: bool
) -> Tensor:
    """Return the logits that predict the tokens at `labels`, a (B, T) mask, as (labels, V)."""
    arguments: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": False}
    positions = labels[:, 1:].any(dim=0).nonzero().squeeze(1)  # (P,) where any row has a label
    if slices:
        arguments["logits_to_keep"] = positions
    logits: Tensor = model(input_ids=ids, **arguments).logits
    if not slices:
        logits = logits[:, positions]
    return logits[labels[:, 1:][:, positions]]


def _score_batch(
    model: nn.Module, batch: Sequence[EncodedRecord], *, slices: bool
) -> tuple[list[float], list[int]]:
    """Return loss and exact-prefix length of each record of one right-padded batch."""
    device = next(model.parameters()).device
    width = max(len(record.ids) for record in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)  # (B, T)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    labels = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, record in enumerate(batch):
        length = len(record.ids)
        ids[row, :length] = torch.tensor(record.ids)
        mask[row, :length] = 1
        labels[row, record.labels_from : length] = True
    ids, mask, labels = ids.to(device), mask.to(device), labels.to(device)
    logits = _label_logits(model, ids, mask, labels, slices=slices)
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
    model: nn.Module, records: Sequence[EncodedRecord], *, batch_tokens: int = 2048
) -> Scores:
    """Score each record once with teacher forcing; logits are made at label positions only.

    Args:
        model: a Hugging Face causal language model; its mode is restored afterwards.
        records: right-padded together in batches sorted by length.
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
    with _evaluating(model):
        for batch in _batches(records, batch_tokens):
            losses[batch], prefixes[batch] = _score_batch(
                model, [records[i] for i in batch], slices=slices
            )
    tokens = np.array([len(record.ids) - record.labels_from for record in records], dtype=np.int64)
    return Scores(losses, tokens, prefixes)
