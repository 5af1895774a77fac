"""The resident trainer of a site: one thread a job, the model loaded once, rounds from a queue.

The thread holds one grant for as long as it works: the ledger holds the whole job's cost before any
data is opened, and a round's steps are recorded before the first of them is run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from queue import Empty, SimpleQueue
from typing import Final

import numpy as np

from llmos.errors import JobInterrupted, LlmosError, UnaccountableMechanism
from llmos.federations import invitations
from llmos.federations.invitations import Invitation, InvitationState, SitePlan
from llmos.jobs.jobs import public_text
from llmos.kernel.monitor import Grant
from llmos.kernel.policy import Action
from llmos.workflows import consent
from llmos.workflows.federated_round import Task, Update, Vector, update_type
from llmos.workflows.parts import Parts
from llmos.workflows.resident_trainer import UPDATE_OBJECT, ResidentTrainer
from llmos.workflows.site_plan import coordinator_principal, policy_context, training_plan
from llmos.workflows.site_settlement import charge_of

# A model that is loaded changes PyTorch's default dtype for the whole process: norms and noise of a
# round that another job trains meanwhile would be computed in it.
_ENGINE: Final = threading.Lock()
_LOOK_S: Final = 0.1
_ERASED_S: Final = 1.0  # how often it is looked for erased units between two rounds


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
    _updates: dict[int, Update] = field(default_factory=dict)
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

    def update(self, number: int) -> Update | None:
        """Return the update of a round once it is trained."""
        return self._updates.get(number)

    def keep(self, number: int, update: Update) -> None:
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
        if card.fingerprint != self.plan.fingerprint:
            raise UnaccountableMechanism(f"{card.name} changed after this job was admitted")
        plan = self._taken_up()
        context = policy_context(self.job, plan, plan.consent, self.parts, at=datetime.now(UTC))
        with kernel.monitor.admit(
            coordinator_principal(manifest),
            Action.FEDERATE,
            card.resource,
            key=self.job.id,
            objects={card.object_id, *self._kept},
            charge=charge_of(manifest, card, training_plan(manifest, plan)),
            context=context,
            details={"manifest_sha256": manifest.digest, "purpose": manifest.purpose},
        ) as grant:
            self._recall(grant)
            self.tell(Happened(self.job.id, "admitted"))
            with self.alone():
                trainer = ResidentTrainer(self.job, plan, grant, self.parts)
            self._work_with(trainer)

    def _taken_up(self) -> SitePlan:
        """Keep what is to be admitted, before the ledger holds it: a kill leaves no unknown hold.

        Of two jobs that are taken up at once the later one sees the earlier one's epsilon.
        """
        agreed = consent.given(self.job, self.parts)
        with self.parts.kernel.store.transaction() as conn:
            since = self.plan.admitted_at or datetime.now(UTC).isoformat()
            plan = replace(self.plan, admitted_at=since, consent=agreed)
            invitations.change(
                conn,
                self.job.id,
                InvitationState.PROPOSED,
                InvitationState.APPROVED,
                InvitationState.RUNNING,
                state=InvitationState.RUNNING,
                plan=plan.text,
            )
        return plan

    def _work_with(self, trainer: ResidentTrainer) -> None:
        """Train rounds as they come, until the job ends."""
        while (first := self._next(trainer)) is not None:
            with self.alone():
                work = self.newest(first)
                if work is None:
                    break
                if work.task is None:
                    trainer.publish(work.weights)
                    self.tell(Happened(self.job.id, "ended"))
                    return
                update, seconds = trainer.train(work.task, work.weights, self._stop.is_set)
                self.keep(work.task.round, update)
                self.tell(Happened(self.job.id, "trained", seconds=seconds))
        raise JobInterrupted(f"{self.job.id} stopped")

    def _next(self, trainer: ResidentTrainer) -> _Work | None:
        """Wait for work; meanwhile whoever is erased is in this process's memory for a second."""
        while True:
            try:
                return self._work.get(timeout=_ERASED_S)
            except Empty:
                trainer.forget_erased()

    @property
    def _kept(self) -> list[str]:
        return [] if self.job.update_object is None else [self.job.update_object]

    def _recall(self, grant: Grant) -> None:
        """Take up the update that was trained before this process began, and paid for."""
        for object_id in self._kept:
            content = self.parts.kernel.vault.read(object_id, UPDATE_OBJECT, grant)
            number = int(self.job.update_round or 0)
            self._asked.add(number)
            kept = np.frombuffer(content, dtype=update_type(self.job.manifest))
            self.keep(number, kept.astype(kept.dtype.newbyteorder("=")))
