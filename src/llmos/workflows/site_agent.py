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
    EngineError,
    JobError,
    LlmosError,
    MeasurementError,
    NetworkError,
    RequestError,
    UnknownJob,
    UpdateRefused,
    VerificationFailed,
)
from llmos.federations import invitations
from llmos.federations.invitations import ENDED, Invitation, InvitationState, SitePlan
from llmos.federations.manifest import Manifest, describe
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.parties.authority import home_of
from llmos.parties.memberships import Membership
from llmos.workflows import consent, site_holds, site_plan, site_statement
from llmos.workflows.parts import Parts
from llmos.workflows.site_answers import SiteAnswers
from llmos.workflows.site_channel import SiteChannel
from llmos.workflows.site_holds import SiteHolds
from llmos.workflows.site_instructions import read_manifest, read_task, require_coordinator
from llmos.workflows.site_poller import News, SitePoller
from llmos.workflows.site_rounds import SiteRounds
from llmos.workflows.site_training import Happened, SiteTraining

LOOK_S: Final = 0.5  # how often decisions of this home's stewards are looked for
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
    _inbox: SimpleQueue[News | Happened | LlmosError] = field(default_factory=SimpleQueue)
    _jobs: dict[str, SiteRounds] = field(default_factory=dict)
    _plans: dict[str, SitePlan] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)  # what is said once
    _channel: SiteChannel = field(init=False)
    _answers: SiteAnswers = field(init=False)
    _holds: SiteHolds = field(init=False)

    def __post_init__(self) -> None:
        """Make the way to the coordinator."""
        self._channel = SiteChannel(self.member.id.organisation, self.parts)
        self._answers = SiteAnswers(self._channel, self.tell)
        self._holds = SiteHolds(self.member.id.organisation, self.parts, self.tell)

    def run(self) -> None:
        """Work until `stop` is set; a coordinator that cannot be reached is asked again.

        What this home can settle by itself it settles before it calls anybody, and as it ends.

        Raises:
            CertificateRefused: the coordinator is another one than before, or this site's
                certificate was revoked or is out of date.
        """
        poller = SitePoller(self._channel, self.who, self.tell, self.stop, self._inbox.put)
        try:
            self._holds.settle()
            self._resume()
            threading.Thread(target=poller.run, name="poll", daemon=True).start()
            while not self.stop.is_set():
                try:
                    item = self._inbox.get(timeout=LOOK_S)
                except Empty:
                    self._look()
                    continue
                if isinstance(item, LlmosError):
                    raise item
                self._handle(item)
                self._look()
        finally:
            self.stop.set()
            for job in self._jobs.values():
                job.training.stop()
            self._holds.settle()

    # from the coordinator

    def _handle(self, item: News | Happened) -> None:
        if isinstance(item, Happened):
            self._trying(item.job, lambda: self._happened(item))
            return
        self._answers.hear(item.instructions, item.asked_at)
        for instruction in item.instructions:
            job_id = instruction["job"]
            act = partial(self._instructed, job_id, instruction, item.verifier)
            self._trying(job_id, act)

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

    def _instructed(self, job_id: str, instruction: dict[str, Any], verifier: Verifier) -> None:
        match instruction:
            case {"kind": "manifest", "envelope": dict(envelope)}:
                self._proposed(job_id, envelope, verifier)
            case {"kind": "round", "phase": str(phase), "task": dict(task), "message": message}:
                asked = read_task(task, verifier, job_id)
                job = self._jobs.get(job_id)
                if job is None:
                    raise JobError(f"{job_id} does not run here")
                job.check(asked)
                job.do(phase, asked, message)
            case {"kind": "ended", "state": str(state)}:
                self._ended(job_id, state, instruction)

    def _proposed(self, job_id: str, envelope: dict[str, Any], verifier: Verifier) -> None:
        """Keep a job that is proposed to this site; nothing runs by that."""
        signed = read_manifest(envelope, verifier, self.member.id, job_id)
        manifest, kernel = signed.manifest, self.parts.kernel
        for known in invitations.invitations(kernel.store):
            if known.id == job_id:
                self._require_same(known, manifest)
                return
        details = {"proposed": manifest.id, "manifest_sha256": manifest.digest}
        with kernel.monitor.act(
            self.who, Action.ADMIT_PARTIES, home_of(kernel), details=details
        ) as conn:
            invitations.receive(conn, signed, self.member.id.organisation)
        self.tell(f"{manifest.id} is proposed: {describe(manifest)}")

    def _require_same(self, known: Invitation, manifest: Manifest) -> None:
        """Say once that a job cannot be taken because another one has its id."""
        ours = known.organisation == self.member.id.organisation
        if not (ours and known.manifest.digest == manifest.digest):
            self._tell_once(
                f"{known.id} cannot be taken: another job of this id was proposed by "
                f"{known.organisation} before"
            )

    def _ended(self, job_id: str, state: str, instruction: dict[str, Any]) -> None:
        job = self._jobs.get(job_id)
        if job is None:
            if instruction.get("statement_wanted") is True:
                self._state(job_id)
            return
        if state == "done":
            digest = str(instruction.get("weights_sha256"))
            job.training.finish(self._channel.weights(job_id, digest, job.manifest))
        else:
            job.training.stop()
            self._close(job_id, InvitationState.FAILED, f"the coordinator says: {state}")
        self._jobs.pop(job_id, None)

    def _state(self, job_id: str) -> None:
        """State what an ended job has spent here; before it is settled the coordinator asks again.

        A home that was not asked to charge anything has nothing to state.
        """
        job = self._own(job_id)
        if job.state not in ENDED or job.plan is None or job.manifest.privacy is None:
            return
        credentials = self._channel.credentials
        part = site_statement.make(job, self.member.id.uri, credentials, self.parts)
        self._channel.state(job_id, part)
        self.tell(f"{job_id}: stated what was spent")

    # from this home

    def _own(self, job_id: str) -> Invitation:
        """Return a job that this coordinator asked for.

        Raises:
            UnknownJob: there is none, or it is another organisation's.
        """
        job = invitations.invitation(self.parts.kernel.store, job_id)
        if job.organisation != self.member.id.organisation:
            raise UnknownJob(f"{job_id} was asked for by another organisation")
        return job

    def _resume(self) -> None:
        """Go on with the jobs that were running when the agent ended."""
        for job in site_holds.of(self.member.id.organisation, self.parts):
            if job.state is InvitationState.RUNNING and job.plan is not None:
                try:
                    self._start(job, job.plan)
                except RequestError as error:
                    why = error.message
                    self._trying(job.id, partial(self._close, job.id, InvitationState.FAILED, why))

    def _look(self) -> None:
        """See what policy and stewards say now, and answer for it."""
        for job in site_holds.of(self.member.id.organisation, self.parts):
            self._trying(job.id, partial(self._look_at, job))

    def _look_at(self, job: Invitation) -> None:
        if job.state in site_holds.LEFT:
            self._leave(job)
        elif job.state is InvitationState.RUNNING:
            running = self._jobs.get(job.id)
            if running is not None and running.units and self._answers.owed(job.id, accepted=True):
                self._accept(job)
        elif job.state is not InvitationState.DONE and job.id not in self._jobs:
            self._consider(job)

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
        else:
            self._tell_once(f"{job.id} waits for a steward: llmos site approve {job.id}")

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
                self._accept(admitted)
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

    def _accept(self, job: Invitation) -> None:
        """Say yes to a job that was admitted."""
        plan = job.plan
        assert plan is not None  # noqa: S101 - it was admitted
        self._answers.give(
            job,
            accepted=True,
            units=plan.units,
            epsilon=plan.epsilon,
            classification=str(self.parts.datasets.card(job.manifest.dataset).classification),
        )

    def _close(self, job_id: str, state: InvitationState, reason: str) -> None:
        """End a job here and say why in the log; what follows from that is seen at the next look.

        Raises:
            JobError: somebody has decided about it in the same moment.
        """
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

    def _leave(self, job: Invitation) -> None:
        """Stop a job that was refused, withdrawn or failed, and tell a coordinator that waits."""
        if (running := self._jobs.pop(job.id, None)) is not None:
            running.training.stop()
        self._holds.release(job)
        if self._answers.owed(job.id, accepted=False):
            self._answers.give(job, accepted=False, reason=str(job.reason or ""))

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self.tell(text)
