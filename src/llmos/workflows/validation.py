"""The global model tried on the coordinator's own data after each round, beside the next one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Final

import torch

from llmos.attacks.scoring import score
from llmos.engines.federated.server_optimizer import ServerState
from llmos.errors import LlmosError
from llmos.federations import register
from llmos.federations.manifest import Manifest
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.models.encoding import encode
from llmos.workflows import federated_adapter
from llmos.workflows.parts import Parts

_MOST_RECORDS: Final = 200  # the first in stored order; a round must not wait for its judge


@dataclass(slots=True)
class Validation:
    """One job's judge: a thread with the model and the records, fed with the weights of rounds."""

    manifest: Manifest
    dataset: str
    who: Principal
    parts: Parts
    tell: Callable[[str], None]
    _rounds: SimpleQueue[ServerState | None] = field(default_factory=SimpleQueue)

    def start(self) -> None:
        """Begin, in a thread of its own."""
        threading.Thread(target=self._run, name=f"{self.manifest.id} loss", daemon=True).start()

    def put(self, state: ServerState) -> None:
        """Try the weights after a round."""
        self._rounds.put(state)

    def end(self) -> None:
        """End after the rounds that were put."""
        self._rounds.put(None)

    def _run(self) -> None:
        try:
            self._judge()
        except LlmosError as error:  # the training goes on without its judge
            self.tell(f"{self.manifest.id}: no loss of the global model: {error.message}")

    def _judge(self) -> None:
        kernel, manifest = self.parts.kernel, self.manifest
        card = self.parts.datasets.card(self.dataset)
        with kernel.monitor.admit(
            self.who,
            Action.MEASURE,
            card.resource,
            key=f"validate-{manifest.id}",
            objects={card.object_id},
            charge=None,
            context={"purpose": manifest.purpose},
            details={"validates": manifest.id, "purpose": manifest.purpose},
        ) as grant:
            loaded, adapter = federated_adapter.load(manifest, self.parts)
            records = [
                encode(
                    record.prompt, record.completion, loaded.tokenizer, manifest.local.max_tokens
                )
                for record, _ in zip(
                    self.parts.datasets.open_records(card, grant),
                    range(_MOST_RECORDS),
                    strict=False,
                )
            ]
            while (state := self._rounds.get()) is not None:
                adapter.load_vector(torch.from_numpy(state.weights.copy()).to(loaded.device))
                scores = score(loaded.model, records)
                loss = float(scores.loss_nats.sum() / scores.tokens.sum())
                with kernel.store.transaction() as conn:
                    register.keep_loss(conn, manifest.id, state.round - 1, loss)
                self.tell(f"{manifest.id}: round {state.round}: loss {loss:.4f}")
