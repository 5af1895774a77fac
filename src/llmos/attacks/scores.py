"""What a model gives for records: the losses and greedy matches that every attack starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmos.errors import MeasurementError


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
