"""The coordinator: offers jobs to their sites, runs their rounds, and keeps each finished one.

What a job has learnt is one checkpoint a round, written in the transaction that records the round.
All else lives in memory: who was heard of last, and the attempt under way. So a coordinator that
is killed goes on with the round that it was in, and no site trains for it twice.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from llmos.errors import (
    AggregationAborted,
    EngineError,
    LlmosError,
    UnknownJob,
    UpdateRefused,
    VerificationFailed,
)
from llmos.federations import register
from llmos.federations.register import FederatedJob, FederatedState
from llmos.kernel.identity import Principal
from llmos.workflows import coordinated_round, publish_federated, running_federation
from llmos.workflows.coordinator_records import CoordinatorRecords
from llmos.workflows.ended_federations import EndedFederations
from llmos.workflows.federated_round import Attempt
from llmos.workflows.federated_state import weights_bytes, weights_sha256
from llmos.workflows.masked_round import MaskedAttempt
from llmos.workflows.parts import Parts
from llmos.workflows.running_federation import Running, read_answer
from llmos.workflows.setbacks import PASSING, Setbacks

Told = Callable[[str], None]


class Coordinator:
    """All federated jobs of one home, while its server runs."""

    def __init__(
        self, who: Principal, parts: Parts, *, tell: Told, changed: Callable[[], None]
    ) -> None:
        """Go on with the jobs that are not ended.

        Args:
            who: runs the coordinator.
            parts: of the home.
            tell: gets one line for people when something happens.
            changed: is called when sites may have something new to do.
        """
        self._who = who
        self._parts = parts
        self._tell = tell
        self._changed = changed
        self._lock = threading.RLock()
        self._running: dict[str, Running] = {}
        self._ended = EndedFederations(who, parts)
        self._setbacks = Setbacks(tell)
        self._records = CoordinatorRecords(who, parts, tell)
        self._heard: dict[str, float] = {}
        self.instance = secrets.token_hex(8)  # versions of another process say nothing
        self.version = 1

    # what sites ask

    def instructions(self, site: str) -> list[dict[str, Any]]:
        """Return what a site has to know and to do, for each of its jobs."""
        with self._lock:
            self._heard[site] = time.monotonic()
            found = [run.instruction(site) for run in self._running.values()]
            ended = self._ended.instructions(site)
        return [one for one in found if one is not None] + ended

    def answer(self, site: str, job_id: str, envelope: Mapping[str, Any]) -> None:
        """Keep a site's signed yes, no or last word.

        Raises:
            UnknownJob: the site has no such job.
            VerificationFailed, RequestError: the answer is not signed by the key that it names, is
                another site's, or of another manifest.
        """
        with self._lock:
            run = self._of(site, job_id)
            said = read_answer(envelope, site, run.job.manifest.digest)
            before = run.answers.get(site)
            if before is not None and before["vkey"] != said["vkey"]:
                raise VerificationFailed(f"{site} answers with another key than before")
            self._records.answer(job_id, site, said, envelope)
            if (why := run.take_answer(site, said)) is not None:
                self._abort(run, why)
            self._bump()
        self.tick()

    def receive(
        self, site: str, job_id: str, number: int, attempt: int, phase: str, body: bytes
    ) -> None:
        """Take a site's message for a round.

        Raises:
            UnknownJob: the site has no such job.
            UpdateRefused: the message is no good; the site is named in the log.
        """
        with self._lock:
            run = self._of(site, job_id)
            before = None if run.attempt is None else run.attempt.phase
            try:
                run.check(site, number, attempt).receive(site, phase, body)
            except UpdateRefused as refused:
                self._records.refusal(job_id, refused)
                raise
            except AggregationAborted as aborted:
                self._abort(run, aborted.message)
            run.bytes_up[site] = run.bytes_up.get(site, 0) + len(body)
            if run.attempt is not None and run.attempt.phase != before:
                run.phase_began = time.monotonic()
            self._carry_on(run, self._conclude)
            self._bump()

    def statement(self, site: str, job_id: str, part: Mapping[str, Any]) -> None:
        """Keep what a site that took part states after a job.

        Raises:
            UnknownJob: no statement of it is wanted, or not any more.
            VerificationFailed: a signature or proof in it is wrong, or its numbers do not follow.
        """
        said = self._ended.check(site, job_id, part)
        with self._lock:
            self._ended.keep(site, job_id, part, said)
        self._tell(f"{job_id}: {said.site} states {said.cost}")

    def weights(self, site: str, job_id: str, digest: str) -> bytes:
        """Return the global weights that a task names, as float32.

        Raises:
            UnknownJob: the site has no such job, or these are not its weights now.
        """
        with self._lock:
            if job_id in self._ended:
                return self._ended.weights(site, job_id, digest)
            state = self._of(site, job_id).state
        if weights_sha256(state) != digest:
            raise UnknownJob(f"{job_id} has no such weights now")
        return weights_bytes(state)

    def largest_body(self, site: str, job_id: str, number: int, attempt: int, phase: str) -> int:
        """Return how many bytes a site's message for a round may have.

        Raises:
            UnknownJob: the site has no such job.
            UpdateRefused: the message comes too late; the site is named in the log.
        """
        with self._lock:
            try:
                return self._of(site, job_id).check(site, number, attempt).largest_body(phase)
            except UpdateRefused as refused:
                self._records.refusal(job_id, refused)
                raise

    def refuse(self, site: str, job_id: str, why: str) -> NoReturn:
        """Refuse a message that was not read to its end.

        Raises:
            UpdateRefused: always; the site is named in the log.
        """
        with self._lock:
            refused = UpdateRefused(site, why)
            self._records.refusal(job_id, refused)
            raise refused

    # what time brings

    def tick(self) -> None:
        """Take up new jobs, close what is over time, begin what can begin."""
        with self._lock:
            self._reload()
            for run in list(self._running.values()):
                self._carry_on(run, self._advance)

    # inside

    def _carry_on(self, run: Running, act: Callable[[Running], None]) -> None:
        """Do what is next for a job; whatever comes of it, the others go on.

        What is wrong with the home passes, and is tried again; what is wrong with the job ends it.
        """
        if self._setbacks.rests(run.job.id):
            return
        try:
            act(run)
        except PASSING as error:
            self._setbacks.suffer(run.job.id, error)
        except Exception as error:  # noqa: BLE001 - one job must not stop the clock of all
            self._fail(run.job, error)
        else:
            if not run.finishing:
                self._setbacks.overcome(run.job.id)

    def _of(self, site: str, job_id: str) -> Running:
        run = self._running.get(job_id)
        if run is None or site not in run.job.manifest.sites:
            raise UnknownJob(f"there is no running job {job_id!r} of {site}")
        return run

    def _reload(self) -> None:
        for job in register.jobs(self._parts.kernel.store):
            known = self._running if job.state is FederatedState.RUNNING else self._ended
            if job.id not in known and not self._setbacks.rests(job.id):
                self._take_up(job)

    def _take_up(self, job: FederatedJob) -> None:
        try:
            if job.state is not FederatedState.RUNNING:
                self._note_end(job.id)
                return
            run = running_federation.load(job, self._who, self._parts, self._tell)
        except PASSING as error:
            self._setbacks.suffer(job.id, error)
        except Exception as error:  # noqa: BLE001 - one job must not stop the clock of all
            self._fail(job, error)
        else:
            self._running[job.id] = run
            self._tell(f"{job.id}: offered to {len(job.manifest.sites)} sites")
            self._bump()

    def _advance(self, run: Running) -> None:
        manifest = run.job.manifest
        if run.finishing:
            return
        if run.state.round >= manifest.rounds:
            run.finishing = True
            threading.Thread(target=self._publish, args=(run,), name=run.job.id).start()
            return
        if run.attempt is not None:
            self._look_at(run, run.attempt)
            return
        willing = run.willing(self._heard)
        if run.is_ready(willing):  # and now without those that cannot prove any more who they are
            willing = coordinated_round.certified(willing, self._parts)
            if len(willing) >= manifest.minimum_sites:
                self._begin(run, run.participants(willing))

    def _look_at(self, run: Running, attempt: Attempt) -> None:
        """Go on with an attempt whose sites have sent all, or have had their time."""
        if attempt.result() is not None:  # it was finished, but could not be kept
            self._conclude(run)
            return
        missing = attempt.missing()
        if not run.is_overdue(missing, self._heard):
            return
        self._tell(f"{run.job.id}: round {run.state.round + 1}: late: {', '.join(missing)}")
        try:
            attempt.close_phase()
            run.phase_began = time.monotonic()
        except EngineError as failed:
            self._abort(run, failed.message)
        self._conclude(run)
        self._bump()

    def _begin(self, run: Running, willing: Mapping[str, int]) -> None:
        coordinated_round.begin(run, willing, self._who, self._parts)
        self._tell(
            f"{run.job.id}: round {run.state.round + 1} of {run.job.manifest.rounds}, "
            f"attempt {run.attempts}, {len(willing)} sites"
        )
        self._bump()

    def _abort(self, run: Running, why: str) -> None:
        self._records.abort(run, why)
        if isinstance(run.attempt, MaskedAttempt) and run.attempt.survivors:
            run.shown = run.attempt.survivors
        run.attempt = None
        run.began = time.monotonic()

    def _conclude(self, run: Running) -> None:
        """Keep the mean of a finished attempt, if it is finished, and go on."""
        before = run.job.checkpoint
        facts = coordinated_round.conclude(run, self._who, self._parts)
        if facts is None:
            return
        self._records.discard(before)
        self._tell(
            f"{run.job.id}: round {run.state.round} done in {facts['seconds']:.1f} s, "
            f"{sum(facts['bytes_up'].values()):,} bytes up from {len(facts['sites'])} sites"
        )
        self._advance(run)

    def _publish(self, run: Running) -> None:
        """Register the trained adapter and end the job; then the sites are told."""
        try:
            result = publish_federated.at_coordinator(
                run.job, run.state, run.answers, self._who, self._parts
            )
        except PASSING as error:
            with self._lock:
                self._setbacks.suffer(run.job.id, error)
                run.finishing = False
        except Exception as error:  # noqa: BLE001 - else the job would stay as if it ran
            with self._lock:
                self._fail(run.job, error)
        else:
            self._tell(f"{run.job.id}: done: model {result['model']}")
            with self._lock:
                self._note_end(run.job.id)

    def _fail(self, job: FederatedJob, error: Exception) -> None:
        """End a job that cannot go on; where even that cannot be kept now, it is tried again."""
        try:
            self._records.failure(job, error)
        except LlmosError as unkept:  # also: it was cancelled meanwhile
            self._setbacks.suffer(job.id, unkept)
        else:
            self._note_end(job.id)

    def _note_end(self, job_id: str) -> None:
        """Remember an ended job, for its sites to hear of it and to fetch what it has learnt."""
        run = self._running.pop(job_id, None)
        self._setbacks.overcome(job_id)
        if run is not None and run.judge is not None:
            run.judge.end()
        self._ended.add(job_id)
        self._bump()

    def _bump(self) -> None:
        self.version += 1
        self._changed()
        for run in self._running.values():
            self._records.status(run)
