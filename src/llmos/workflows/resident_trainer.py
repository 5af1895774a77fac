"""A site's model, data and optimizer between the rounds of one federated job."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
import torch

from llmos.engines.dp.plan import Performance
from llmos.engines.dp.randomness import Purpose, Randomness
from llmos.engines.dp.rounds import clipped_sum, train_round
from llmos.engines.dp.run import Run, prepare
from llmos.engines.dp.sampling import TrainingRecord
from llmos.errors import JobInterrupted
from llmos.federations import invitations
from llmos.federations.invitations import Invitation, InvitationState, SitePlan
from llmos.kernel import accounting
from llmos.kernel.monitor import Grant
from llmos.kernel.policy import Action
from llmos.models.encoding import encode
from llmos.workflows import federated_adapter, masked_round, publish_federated
from llmos.workflows.federated_round import Task, Update, Vector, update_type
from llmos.workflows.parts import Parts
from llmos.workflows.site_plan import (
    context_of_admission,
    coordinator_principal,
    policy_context,
    training_plan,
)
from llmos.workflows.site_settlement import settle

UPDATE_OBJECT: Final = "federated-update"  # the vault's kind of object


class ResidentTrainer:
    """One admitted job at a site: the model is loaded once, rounds are trained as they come."""

    def __init__(self, job: Invitation, plan: SitePlan, grant: Grant, parts: Parts) -> None:
        """Load the model and open the data.

        Args:
            job: what was admitted.
            plan: as it was admitted, with who approved it.
            grant: over the job's data, and over its charge.
            parts: of the site.

        Raises:
            UnknownModel, ModelError: this home has not got the base model that the job means.
        """
        manifest = job.manifest
        self._job, self._site_plan, self._grant, self._parts = job, plan, grant, parts
        self._plan, self._asks = training_plan(manifest, plan), coordinator_principal(manifest)
        self._card = parts.datasets.card(manifest.dataset)
        loaded, self._adapter = federated_adapter.load(manifest, parts)
        self._tokenizer = loaded.tokenizer
        self._performance = Performance(
            threads=parts.kernel.config.threads, device=str(loaded.device)
        )
        self._erased = 0  # units that were left out when the records were opened
        self._run: Run | None = None
        self._self_tested = False
        self._opened()

    def forget_erased(self) -> None:
        """Let go of the open records once somebody is erased; the next round opens what is left."""
        if self._has_lost():
            self._run = None

    def _has_lost(self) -> bool:
        """Tell whether somebody was erased since the records were opened."""
        return self._parts.datasets.erased(self._card) != self._erased

    def _opened(self) -> Run:
        """Return what is trained on: the records of all who are not erased.

        Fewer units than were admitted are those of a neighbouring dataset; the charge stays.
        """
        self.forget_erased()
        if self._run is None:
            self._erased = self._parts.datasets.erased(self._card)
            most = self._job.manifest.local.max_tokens
            records = tuple(
                TrainingRecord(record.unit, encoded.ids, encoded.labels_from)
                for record in self._parts.datasets.open_records(self._card, self._grant)
                for encoded in [encode(record.prompt, record.completion, self._tokenizer, most)]
            )
            self._run = prepare(self._adapter, records, self._plan, self._performance)
            self._self_tested = False
        return self._run

    def train(self, task: Task, weights: Vector, stop: Callable[[], bool]) -> tuple[Update, float]:
        """Train a round from the global weights (P,); return its update (P,), kept, and seconds.

        Raises:
            PermissionDenied: this site's policy no longer permits the job; nothing is charged.
            JobError: the job does not run any more; nothing is charged.
            UpdateRefused: this round, or a later one, was trained before; nothing is charged.
            JobInterrupted: `stop` returned true; what was recorded stays charged.
        """
        kernel, job = self._parts.kernel, self._job
        details: dict[str, Any] = {"step": "round", **task.to_dict()}
        context = policy_context(
            job, self._site_plan, self._site_plan.consent, self._parts, at=datetime.now(UTC)
        )
        with kernel.monitor.act(
            self._asks,
            Action.FEDERATE,
            self._card.resource,
            details=details,
            context=context,
        ) as conn:
            invitations.begin_round(conn, job.id, task.round)
        start = torch.from_numpy(weights.copy()).to(self._adapter.parameters()[0].device)
        began = time.monotonic()
        while (update := self._attempted(task, start, stop)) is None:
            pass
        seconds = time.monotonic() - began
        self._keep(task, update)
        return update, seconds

    def _attempted(
        self, task: Task, start: torch.Tensor, stop: Callable[[], bool]
    ) -> Update | None:
        """Charge a round and run it; return None if somebody was erased and it is to be run again.

        Under privacy a repeated round is charged anew, to the spare ones: its noise is fresh.
        """
        run = self._opened()
        if self._plan.mechanism is not None:
            done = self._parts.kernel.budget.reservation(self._job.id).steps_done
            self._grant.progress(done + self._job.manifest.local.steps)
        if self._job.manifest.shared_noise is None:
            return self._trained(run, task, start, stop)
        return self._noisy_sum(run, task, start)

    def _trained(
        self, run: Run, task: Task, start: torch.Tensor, stop: Callable[[], bool]
    ) -> Update | None:
        """Return what the steps of a round add to the weights; None if somebody was erased.

        Steps under privacy that were all run before stay: they were charged.
        """
        local = self._job.manifest.local
        trained = train_round(
            run,
            start,
            first_step=task.round * local.steps,
            steps=local.steps,
            randomness=Randomness.fresh(),
            proximal=local.proximal,
            self_tested=self._self_tested,
            stop=lambda: stop() or self._has_lost(),
        )
        if trained.steps < local.steps and stop():
            raise JobInterrupted(f"{self._job.id} stopped in round {task.round}")
        if trained.steps < local.steps or (self._plan.mechanism is None and self._has_lost()):
            return None
        self._self_tested = trained.self_tested
        return federated_adapter.to_numpy(trained.weights - start)

    def _noisy_sum(self, run: Run, task: Task, start: torch.Tensor) -> Update:
        """Return the clipped sum of a batch as integers with this site's share of the noise.

        They are kept as they are: the same sum under two draws of noise would have less of it.
        """
        found = clipped_sum(run, start, step=task.round, self_tested=self._self_tested)
        self._self_tested = found.self_tested
        noise = found.randomness.stream(Purpose.NOISE, task.round)
        grid = masked_round.grid_of(task, self._job.manifest)
        total = federated_adapter.to_numpy(found.total)
        return grid.to_residues(total, noise.words).view(np.int32)

    def _keep(self, task: Task, update: Update) -> None:
        """Keep a finished update, so that a killed site does not train and pay for it again."""
        kernel, job = self._parts.kernel, self._job
        before = invitations.invitation(kernel.store, job.id).update_object
        object_id = kernel.vault.put(
            UPDATE_OBJECT, update.astype(update_type(job.manifest)).tobytes()
        )
        with ExitStack() as undo:  # a job that was withdrawn meanwhile keeps no update
            undo.callback(kernel.vault.delete, object_id)
            with kernel.store.transaction() as conn:
                invitations.change(
                    conn,
                    job.id,
                    InvitationState.RUNNING,
                    update_round=task.round,
                    update_object=object_id,
                    released=None,
                )
            undo.pop_all()
        if before is not None:
            kernel.vault.delete(before)

    def publish(self, weights: Vector) -> None:
        """Settle for what was run, publish the final adapter here, and end, in one transaction.

        Raises:
            ModelExists: both names that the adapter could get are taken.
        """
        kernel, job, registry = self._parts.kernel, self._job, self._parts.registry
        manifest = job.manifest
        object_id, digest = publish_federated.store(self._adapter, weights, manifest, self._parts)
        name = publish_federated.free_name(manifest.output, manifest.id, self._parts)
        mechanism = self._plan.mechanism
        card = publish_federated.model_card(manifest, {str(self._card.classification)})
        details = {"step": "publish", "job": job.id, "model": name, "digest": digest}
        now = invitations.invitation(kernel.store, job.id)
        kept = now.update_object
        with kernel.monitor.act(
            self._asks,
            Action.FEDERATE,
            self._card.resource,
            details=details,
            context=context_of_admission(now, self._parts),
        ) as conn:
            settle(self._grant, self._plan, job.id, self._parts, conn=conn)
            if mechanism is not None:
                steps = kernel.budget.reservation(job.id).steps_done
                epsilon = accounting.epsilon(mechanism.after(steps), manifest.privacy.delta)  # type: ignore[union-attr]
                card |= {"epsilon": epsilon, "steps": steps}
            card |= {"dataset": self._card.name, "fingerprint": self._card.fingerprint}
            registry.publish_adapter(
                conn, name=name, base=manifest.model, object_id=object_id, digest=digest, card=card
            )
            invitations.change(
                conn,
                job.id,
                InvitationState.RUNNING,
                state=InvitationState.DONE,
                update_round=None,
                update_object=None,
            )
        if kept is not None:
            kernel.vault.delete(kept)
