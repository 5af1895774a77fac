"""The resident trainer of a site: one thread a job, the model loaded once, rounds from a queue.

The thread holds one grant for as long as it works: the ledger holds the whole job's cost before any
data is opened, and a round's steps are recorded before the first of them is run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from queue import SimpleQueue
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from sqlalchemy import Connection

from llmos.data.datasets import DatasetCard
from llmos.engines.dp.plan import DPPlan, Performance
from llmos.engines.dp.randomness import Randomness
from llmos.engines.dp.rounds import train_round
from llmos.engines.dp.run import prepare
from llmos.engines.dp.sampling import TrainingRecord
from llmos.errors import JobInterrupted, LlmosError, UnaccountableMechanism
from llmos.federations import invitations
from llmos.federations.invitations import Invitation, InvitationState, SitePlan
from llmos.federations.manifest import Manifest
from llmos.jobs.jobs import public_text
from llmos.kernel import accounting
from llmos.kernel.budget import ReservationState
from llmos.kernel.identity import Principal
from llmos.kernel.monitor import Charge, Grant
from llmos.kernel.policy import Action
from llmos.kernel.pools import Part
from llmos.models.encoding import encode
from llmos.workflows import consent, federated_adapter, publish_federated
from llmos.workflows.federated_round import Task
from llmos.workflows.parts import Parts
from llmos.workflows.site_plan import (
    context_of_admission,
    coordinator_principal,
    policy_context,
    training_plan,
)

Vector = NDArray[np.float32]
UPDATE_OBJECT: Final = "federated-update"  # the vault's kind of object
# A model that is loaded changes PyTorch's default dtype for the whole process: norms and noise of a
# round that another job trains meanwhile would be computed in it.
_ENGINE: Final = threading.Lock()
_LOOK_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Happened:
    """What a trainer tells the site's agent."""

    job: str
    what: str  # admitted, trained, ended, failed
    error: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Work:
    """A round to train, or the end with the final weights."""

    task: Task | None
    weights: Vector


@dataclass(slots=True)
class SiteTraining:
    """One admitted job at work."""

    job: Invitation
    plan: SitePlan
    parts: Parts
    tell: Callable[[Happened], None]
    _work: SimpleQueue[_Work | None] = field(default_factory=SimpleQueue)
    _stop: threading.Event = field(default_factory=threading.Event)
    _updates: dict[int, Vector] = field(default_factory=dict)
    _asked: set[int] = field(default_factory=set)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Ask the kernel for admission and begin to work, in a thread of its own."""
        self._thread = threading.Thread(target=self._run, name=self.job.id, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop at the next step and wait for it."""
        self._stop.set()
        self._work.put(None)
        if self._thread is not None:
            self._thread.join()

    def train(self, task: Task, weights: Vector) -> None:
        """Train a round, unless that is done or under way."""
        if task.round not in self._asked:
            self._asked.add(task.round)
            self._work.put(_Work(task, weights))

    def newest(self, work: _Work) -> _Work | None:
        """Return the last of what waits: rounds before it are over, and would be paid for."""
        found: _Work | None = work
        while found is not None and found.task is not None and not self._work.empty():
            found = self._work.get()
        return found

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Load and train while no other job of this process does.

        Raises:
            JobInterrupted: this job was stopped while it waited.
        """
        while not _ENGINE.acquire(timeout=_LOOK_S):
            if self._stop.is_set():
                raise JobInterrupted(f"{self.job.id} stopped")
        try:
            yield
        finally:
            _ENGINE.release()

    def asked(self, number: int) -> bool:
        """Tell whether a round is trained or under way."""
        return number in self._asked

    def finish(self, weights: Vector) -> None:
        """Publish the final weights here, settle, and end."""
        self._work.put(_Work(None, weights))

    def update(self, number: int) -> Vector | None:
        """Return the update of a round once it is trained."""
        return self._updates.get(number)

    def keep(self, number: int, update: Vector) -> None:
        """Keep the update of the newest round; those before are over."""
        self._updates = {number: update}

    def _run(self) -> None:
        try:
            self._work_under_grant()
        except JobInterrupted:
            return
        except LlmosError as error:
            self.tell(Happened(self.job.id, "failed", error.message))
        except Exception as error:  # noqa: BLE001 - a thread's end is the agent's to tell
            self.tell(Happened(self.job.id, "failed", public_text(error)))

    def _work_under_grant(self) -> None:
        kernel, manifest = self.parts.kernel, self.job.manifest
        card = self.parts.datasets.card(manifest.dataset)
        plan = self.plan
        if card.fingerprint != plan.fingerprint:
            raise UnaccountableMechanism(f"{card.name} changed after this job was admitted")
        dp_plan = training_plan(manifest, plan)
        charge = charge_of(manifest, card, dp_plan)
        asks = coordinator_principal(manifest)
        agreed, at = consent.given(self.job, self.parts), datetime.now(UTC)
        context = policy_context(self.job, plan, agreed, self.parts, at=at)
        if self.job.plan is None:
            plan = replace(plan, admitted_at=at.isoformat(), consent=agreed)
        with kernel.monitor.admit(
            asks,
            Action.FEDERATE,
            card.resource,
            key=self.job.id,
            objects={card.object_id, *self._kept},
            charge=charge,
            context=context,
            details={"manifest_sha256": manifest.digest, "purpose": manifest.purpose},
        ) as grant:
            with kernel.store.transaction() as conn:
                states = (InvitationState.PROPOSED, InvitationState.APPROVED)
                invitations.change(
                    conn,
                    self.job.id,
                    *states,
                    InvitationState.RUNNING,
                    state=InvitationState.RUNNING,
                    plan=plan.text,
                )
            self._recall(grant)
            self.tell(Happened(self.job.id, "admitted"))
            with self.alone():
                resident = _Resident(self, grant, card, dp_plan, asks, agreed)
            resident.work()

    @property
    def _kept(self) -> list[str]:
        return [] if self.job.update_object is None else [self.job.update_object]

    def _recall(self, grant: Grant) -> None:
        """Take up the update that was trained before this process began, and paid for."""
        for object_id in self._kept:
            content = self.parts.kernel.vault.read(object_id, UPDATE_OBJECT, grant)
            number = int(self.job.update_round or 0)
            self._asked.add(number)
            self.keep(number, np.frombuffer(content, dtype="<f4").astype(np.float32))


class _Resident:
    """Model, data and state between the rounds of one job."""

    def __init__(
        self,
        training: SiteTraining,
        grant: Grant,
        card: DatasetCard,
        plan: DPPlan,
        asks: Principal,
        agreed: str | None,
    ) -> None:
        self._training, self._grant, self._plan = training, grant, plan
        self._parts, self._card = training.parts, card
        self._asks, self._agreed = asks, agreed
        manifest = training.job.manifest
        loaded, self._adapter = federated_adapter.load(manifest, self._parts)
        records = tuple(
            TrainingRecord(record.unit, encoded.ids, encoded.labels_from)
            for record in self._parts.datasets.open_records(card, grant)
            for encoded in [
                encode(
                    record.prompt, record.completion, loaded.tokenizer, manifest.local.max_tokens
                )
            ]
        )
        performance = Performance(
            threads=self._parts.kernel.config.threads, device=str(loaded.device)
        )
        self._run = prepare(self._adapter, records, plan, performance)
        self._self_tested = False

    def work(self) -> None:
        """Train rounds as they come, until the job ends."""
        while (first := self._training._work.get()) is not None:
            with self._training.alone():
                work = self._training.newest(first)
                if work is None:
                    break
                if work.task is None:
                    self._finish(work.weights)
                    return
                self._train(work.task, work.weights)
        raise JobInterrupted(f"{self._training.job.id} stopped")

    def _train(self, task: Task, weights: Vector) -> None:
        kernel, job = self._parts.kernel, self._training.job
        manifest, steps = job.manifest, job.manifest.local.steps
        details: dict[str, Any] = {"step": "round", **task.to_dict()}
        now = invitations.invitation(kernel.store, job.id)
        context = policy_context(
            now, self._training.plan, self._agreed, self._parts, at=datetime.now(UTC)
        )
        with kernel.monitor.act(
            self._asks,
            Action.FEDERATE,
            self._card.resource,
            details=details,
            context=context,
        ):
            pass
        if self._plan.mechanism is not None:
            done = kernel.budget.reservation(job.id).steps_done
            self._grant.progress(done + steps)
        start = torch.from_numpy(weights.copy()).to(self._adapter.parameters()[0].device)
        began = time.monotonic()
        trained = train_round(
            self._run,
            start,
            first_step=task.round * steps,
            steps=steps,
            randomness=Randomness.fresh(),
            proximal=manifest.local.proximal,
            self_tested=self._self_tested,
            stop=self._training._stop.is_set,
        )
        if trained.steps < steps:
            raise JobInterrupted(f"{job.id} stopped in round {task.round}")
        self._self_tested = trained.self_tested
        update = federated_adapter.to_numpy(trained.weights - start)
        seconds = time.monotonic() - began
        self._keep(task, update)
        self._training.keep(task.round, update)
        self._training.tell(Happened(job.id, "trained", seconds=seconds))

    def _keep(self, task: Task, update: Vector) -> None:
        """Keep a finished update, so that a killed site does not train and pay for it again."""
        kernel, job = self._parts.kernel, self._training.job
        before = invitations.invitation(kernel.store, job.id).update_object
        object_id = kernel.vault.put(UPDATE_OBJECT, update.astype("<f4").tobytes())
        with kernel.store.transaction() as conn:
            invitations.change(
                conn,
                job.id,
                InvitationState.RUNNING,
                update_round=task.round,
                update_object=object_id,
                released=None,
            )
        if before is not None:
            kernel.vault.delete(before)

    def _finish(self, weights: Vector) -> None:
        """Settle for what was run, publish the final adapter here, and end, in one transaction."""
        kernel, job, registry = self._parts.kernel, self._training.job, self._parts.registry
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
        self._training.tell(Happened(job.id, "ended"))


def settle(grant: Grant, plan: DPPlan, job_id: str, parts: Parts, *, conn: Connection) -> None:
    """Spend what was run and give back the rest of the hold."""
    if plan.mechanism is None:
        return
    steps = parts.kernel.budget.reservation(job_id).steps_done
    if steps == 0:
        grant.abort(conn=conn)
    else:
        grant.settle(plan.mechanism.after(steps), conn=conn)


def release(job: Invitation, parts: Parts) -> None:
    """Settle a job that ended here before its last round, and delete the update it kept.

    Raises:
        PermissionDenied: policy no longer lets the coordinator ask for anything; the hold stays.
    """
    kernel, plan = parts.kernel, job.plan
    if plan is None:
        return
    card = parts.datasets.card(job.manifest.dataset)
    dp_plan = training_plan(job.manifest, plan)
    charge = charge_of(job.manifest, card, dp_plan)
    if charge is not None and kernel.budget.reservation(job.id).state is ReservationState.HELD:
        with (
            kernel.monitor.admit(
                coordinator_principal(job.manifest),
                Action.FEDERATE,
                card.resource,
                key=job.id,
                objects=(),
                charge=charge,
                context=context_of_admission(job, parts),
                details={"step": "before release"},
            ) as grant,
            kernel.store.transaction() as conn,
        ):
            settle(grant, dp_plan, job.id, parts, conn=conn)
    if job.update_object is not None:
        with kernel.store.transaction() as conn:
            invitations.change(conn, job.id, job.state, update_object=None, update_round=None)
        kernel.vault.delete(job.update_object)


def charge_of(manifest: Manifest, card: DatasetCard, plan: DPPlan) -> Charge | None:
    """Return what a job costs whom at this site; None without privacy."""
    if plan.mechanism is None:
        return None
    part = Part(manifest.purpose, None)
    return Charge(card.name, part, card.fingerprint, card.unit_column, plan.mechanism)
