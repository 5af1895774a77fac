"""A site's agent: asks its coordinator what there is to do, and does what this home admits.

The agent calls, nobody calls it. What it may run was installed here before; a job brings numbers.
It knows four kinds of instructions (a manifest, a phase of a round, waiting, an end) and is safe
against hearing each of them again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Final

from llmos.crypto.notes import Verifier
from llmos.errors import (
    AggregationAborted,
    CertificateRefused,
    EngineError,
    JobError,
    LlmosError,
    MeasurementError,
    NetworkError,
    RequestError,
    UpdateRefused,
    VerificationFailed,
)
from llmos.federations import invitations
from llmos.federations.invitations import ENDED, Invitation, InvitationState, SitePlan
from llmos.federations.manifest import describe
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.parties.authority import home_of
from llmos.parties.memberships import Membership
from llmos.workflows import consent, site_plan, site_settlement, site_statement
from llmos.workflows.federated_round import Task
from llmos.workflows.parts import Parts
from llmos.workflows.site_channel import SiteChannel
from llmos.workflows.site_instructions import read_manifest, read_task, require_coordinator
from llmos.workflows.site_rounds import SiteRounds
from llmos.workflows.site_training import Happened, SiteTraining

LOOK_S: Final = 0.5  # how often decisions of this home's stewards are looked for
RETRY_S: Final = 2.0  # after a call that failed
_TRIED_AGAIN: Final = (
    NetworkError,
    UpdateRefused,
    AggregationAborted,
    JobError,
    RequestError,
    MeasurementError,
)


@dataclass(slots=True)
class SiteAgent:
    """One site of one federation."""

    member: Membership
    who: Principal
    parts: Parts
    tell: Callable[[str], None]
    stop: threading.Event
    _inbox: SimpleQueue[dict[str, Any] | Happened | CertificateRefused] = field(
        default_factory=SimpleQueue
    )
    _jobs: dict[str, SiteRounds] = field(default_factory=dict)
    _answered: dict[str, bool] = field(default_factory=dict)
    _plans: dict[str, SitePlan] = field(default_factory=dict)
    _hinted: set[str] = field(default_factory=set)
    _verifier: Verifier | None = None

    @property
    def _channel(self) -> SiteChannel:
        return SiteChannel(self.member.id.organisation, self.parts)

    def run(self) -> None:
        """Work until `stop` is set; a coordinator that cannot be reached is asked again.

        Raises:
            CertificateRefused: the coordinator is another one than before, or this site's
                certificate was revoked or is out of date.
        """
        self._resume()
        poller = threading.Thread(target=self._poll, name="poll", daemon=True)
        poller.start()
        try:
            while not self.stop.is_set():
                try:
                    item = self._inbox.get(timeout=LOOK_S)
                except Empty:
                    self._look()
                    continue
                if isinstance(item, CertificateRefused):
                    raise item
                self._handle(item)
                self._look()
        finally:
            self.stop.set()
            for job in self._jobs.values():
                job.training.stop()

    # from the coordinator

    def _poll(self) -> None:
        """Ask for instructions, again and again; each answer goes to the inbox."""
        instance, seen, silent = "", 0, False
        while not self.stop.is_set():
            try:
                if self._verifier is None:
                    self._verifier = self._channel.coordinator_key()
                instance, seen, instructions = self._channel.poll(instance, seen)
                if silent:
                    self.tell(f"{self.member.url} is there again")
                silent = False
                self._inbox.put({"instructions": instructions})
            except (NetworkError, RequestError, VerificationFailed) as error:
                if not silent:
                    self.tell(f"{error.message}; trying again")
                silent = True
                self.stop.wait(RETRY_S)
            except CertificateRefused as error:
                self._inbox.put(error)
                return

    def _handle(self, item: dict[str, Any] | Happened) -> None:
        if isinstance(item, Happened):
            self._trying(item.job, lambda: self._happened(item))
            return
        for instruction in item["instructions"]:
            job_id = str(instruction["job"])
            self._trying(job_id, partial(self._instructed, job_id, instruction))

    def _trying(self, job_id: str, act: Callable[[], None]) -> None:
        """Do something about a job; what the coordinator refuses or spoils does not end the agent.

        It is tried again when the coordinator asks again.
        """
        try:
            act()
        except _TRIED_AGAIN as error:
            self.tell(f"{job_id}: {error.message}")
        except (VerificationFailed, EngineError) as error:
            self.tell(f"{job_id}: the coordinator is not believed: {error.message}")

    def _instructed(self, job_id: str, instruction: dict[str, Any]) -> None:
        match instruction:
            case {"kind": "manifest", "envelope": dict(envelope)}:
                self._proposed(job_id, envelope)
            case {"kind": "round", "phase": str(phase), "task": dict(task), "message": message}:
                asked = self._task(task, job_id)
                self._jobs[job_id].do(phase, asked, message)
            case {"kind": "ended", "state": str(state)}:
                self._ended(job_id, state, instruction)

    def _proposed(self, job_id: str, envelope: dict[str, Any]) -> None:
        """Keep a job that is proposed to this site; nothing runs by that."""
        assert self._verifier is not None  # noqa: S101 - instructions come after it
        signed = read_manifest(envelope, self._verifier, self.member.id, job_id)
        manifest, kernel = signed.manifest, self.parts.kernel
        self._answered.pop(manifest.id, None)  # the coordinator has no answer of ours
        if any(known.id == manifest.id for known in invitations.invitations(kernel.store)):
            return
        details = {"proposed": manifest.id, "manifest_sha256": manifest.digest}
        with kernel.monitor.act(
            self.who, Action.ADMIT_PARTIES, home_of(kernel), details=details
        ) as conn:
            invitations.receive(conn, signed, self.member.id.organisation)
        self.tell(f"{manifest.id} is proposed: {describe(manifest)}")

    def _task(self, envelope: dict[str, Any], job_id: str) -> Task:
        """Read the signed task of a round, for a job that runs here."""
        assert self._verifier is not None  # noqa: S101 - instructions come after it
        task = read_task(envelope, self._verifier, job_id)
        job = self._jobs.get(job_id)
        if job is None:
            raise JobError(f"{job_id} does not run here")
        job.check(task)
        return task

    def _ended(self, job_id: str, state: str, instruction: dict[str, Any]) -> None:
        job = self._jobs.get(job_id)
        if job is None:
            if instruction.get("statement_wanted") is True:
                self._state(job_id)
            return
        if state == "done":
            digest = str(instruction["weights_sha256"])
            job.training.finish(self._channel.weights(job_id, digest, job.manifest))
        else:
            job.training.stop()
            self._close(job_id, InvitationState.FAILED, f"the coordinator says: {state}")
        del self._jobs[job_id]

    def _state(self, job_id: str) -> None:
        """State what an ended job has spent here; before it is settled the coordinator asks again.

        A home that was not asked to charge anything has nothing to state.
        """
        job = invitations.invitation(self.parts.kernel.store, job_id)
        if job.state not in ENDED or job.plan is None or job.manifest.privacy is None:
            return
        credentials = self._channel.credentials
        part = site_statement.make(job, self.member.id.uri, credentials, self.parts)
        self._channel.state(job_id, part)
        self.tell(f"{job_id}: stated what was spent")

    # from this home

    def _resume(self) -> None:
        """Go on with the jobs that were running when the agent ended."""
        for job in invitations.invitations(self.parts.kernel.store):
            ours = job.organisation == self.member.id.organisation
            if ours and job.state is InvitationState.RUNNING and job.plan is not None:
                try:
                    self._start(job, job.plan)
                except RequestError as error:
                    self._close(job.id, InvitationState.FAILED, error.message)

    def _look(self) -> None:
        """See what policy and stewards say now, and answer for it."""
        for job in invitations.invitations(self.parts.kernel.store):
            if job.organisation != self.member.id.organisation:
                continue
            if job.state in {InvitationState.PROPOSED, InvitationState.APPROVED}:
                if job.id not in self._jobs:
                    self._consider(job)
            elif job.state in {InvitationState.REFUSED, InvitationState.WITHDRAWN}:
                self._leave(job)

    def _consider(self, job: Invitation) -> None:
        """Start a job that policy admits now; one without consent waits."""
        kernel = self.parts.kernel
        try:
            require_coordinator(job.manifest, job.organisation)
            card = self.parts.datasets.card(job.manifest.dataset)
            plan = self._plans.get(job.id)
            if plan is None:  # the search for the noise takes seconds
                plan = self._plans[job.id] = site_plan.make_plan(job.manifest, card)
            agreed = consent.given(job, self.parts)
            context = site_plan.policy_context(job, plan, agreed, self.parts, at=datetime.now(UTC))
            asks = site_plan.coordinator_principal(job.manifest)
            decision = kernel.policy.decide(asks, Action.FEDERATE, card.resource, context)
        except LlmosError as error:
            self._close(job.id, InvitationState.REFUSED, error.message)
            return
        if decision.allowed:
            self._start(job, plan)
        elif job.state is InvitationState.APPROVED:
            self._close(job.id, InvitationState.REFUSED, f"policy: {decision.reason}")
        elif job.id not in self._hinted:
            self._hinted.add(job.id)
            self.tell(f"{job.id} waits for a steward: llmos site approve {job.id}")

    def _start(self, job: Invitation, plan: SitePlan) -> None:
        require_coordinator(job.manifest, job.organisation)
        training = SiteTraining(job, plan, self.parts, self._inbox.put)
        self._jobs[job.id] = SiteRounds(training, self._channel, self.parts, self.tell)
        training.start()

    def _happened(self, happened: Happened) -> None:
        job_id, kernel = happened.job, self.parts.kernel
        job = self._jobs.get(job_id)
        match happened.what:
            case "admitted" if job is not None:
                admitted = invitations.invitation(kernel.store, job_id)
                assert admitted.plan is not None  # noqa: S101 - it was admitted
                job.units = admitted.plan.units
                card = self.parts.datasets.card(admitted.manifest.dataset)
                kind = str(card.classification)
                self._answer(admitted, accepted=True, plan=admitted.plan, classification=kind)
                self.tell(f"{job_id} is admitted: epsilon {admitted.plan.epsilon}")
            case "trained" if job is not None:
                self.tell(f"{job_id}: trained in {happened.seconds:.2f} s")
                job.upload()
            case "ended":
                self.tell(f"{job_id} is done")
                self._state(job_id)
            case "failed":
                self._jobs.pop(job_id, None)
                self._close(job_id, InvitationState.FAILED, happened.error)

    def _close(self, job_id: str, state: InvitationState, reason: str) -> None:
        """End a job here and say why, in the log and to the coordinator."""
        kernel = self.parts.kernel
        job = invitations.invitation(kernel.store, job_id)
        if job.state in ENDED:
            return
        details = {"federated_job": job_id, "ended": str(state), "reason": reason}
        with kernel.monitor.act(
            self.who, Action.ADMIT_PARTIES, home_of(kernel), details=details
        ) as conn:
            invitations.change(conn, job_id, job.state, state=state, reason=reason)
        self.tell(f"{job_id} is {state}: {reason}")
        self._release(invitations.invitation(kernel.store, job_id))
        self._answer(invitations.invitation(kernel.store, job_id), accepted=False, reason=reason)

    def _leave(self, job: Invitation) -> None:
        """Stop a job that a steward refused or withdrew, and tell the coordinator, once."""
        if (running := self._jobs.pop(job.id, None)) is not None:
            running.training.stop()
        if self._answered.get(job.id) is not False:
            self._release(job)
            self._answer(job, accepted=False, reason=str(job.reason or ""))

    def _release(self, job: Invitation) -> None:
        try:
            site_settlement.release(job, self.parts)
        except LlmosError as error:
            self.tell(f"{job.id}: its budget is still held: {error.message}")

    def _answer(
        self,
        job: Invitation,
        *,
        accepted: bool,
        reason: str = "",
        plan: SitePlan | None = None,
        classification: str = "",
    ) -> None:
        try:
            self._channel.answer(
                job,
                accepted=accepted,
                reason=reason,
                units=0 if plan is None else plan.units,
                epsilon=None if plan is None else plan.epsilon,
                classification=classification,
            )
        except NetworkError as error:
            self.tell(f"{job.id}: the answer did not arrive: {error.message}")
            return
        except RequestError as error:  # the job has ended: nobody waits for an answer
            self.tell(f"{job.id}: {error.message}")
        self._answered[job.id] = accepted
