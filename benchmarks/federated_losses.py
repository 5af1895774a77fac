"""What adapters are worth: their losses on notes that nobody trained on, one judge for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch

from llmos.attacks.scoring import score
from llmos.engines.dp.plan import AdamWSettings, DPPlan, Performance
from llmos.engines.dp.rounds import train_round
from llmos.engines.dp.run import prepare
from llmos.engines.dp.sampling import TrainingRecord
from llmos.federations.manifest import Adapter
from llmos.models import lora
from llmos.models.encoding import Encoded, encode
from llmos.models.loading import load_base
from llmos.workflows import federated_adapter

MAX_TOKENS: Final = 96
THREADS: Final = 2


class Judge:
    """One base model and the notes of all sites that nobody trains on."""

    def __init__(self, folder: Path, held_out: Sequence[str]) -> None:
        self.loaded = load_base(folder, torch.device("cpu"))
        self._held_out = self.encode(held_out)

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Encode notes as an import of text does."""
        return [encode("", text, self.loaded.tokenizer, MAX_TOKENS) for text in texts]

    def loss(self) -> float:
        """Return the held-out loss of the model as it is now, in nats per token."""
        scores = score(self.loaded.model, self._held_out)
        return float(scores.loss_nats.sum() / scores.tokens.sum())

    def loss_of(self, files: Mapping[str, bytes]) -> float:
        """Return the held-out loss with an adapter in PEFT's format."""
        adapter = lora.from_peft(self.loaded.model, files)
        try:
            return self.loss()
        finally:
            lora.detach(adapter)

    def train(
        self, texts: Sequence[str], asked: Adapter, *, steps: int, batch: int, learning_rate: float
    ) -> float:
        """Train an adapter on notes in one place, without privacy, and return its loss."""
        adapter = federated_adapter.attach(asked, self.loaded)
        records = tuple(
            TrainingRecord(str(number), note.ids, note.labels_from)
            for number, note in enumerate(self.encode(texts))
        )
        plan = DPPlan(
            units=len(records),
            expected_batch_units=float(batch),
            steps=steps,
            privacy=None,
            max_records_per_unit=1,
            optimizer=AdamWSettings(learning_rate=learning_rate),
        )
        try:
            run = prepare(adapter, records, plan, Performance(threads=THREADS))
            train_round(run, adapter.vector(), first_step=0, steps=steps)
            return self.loss()
        finally:
            lora.detach(adapter)
