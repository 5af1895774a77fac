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
from typing import Any, Final, NoReturn

from llmos.errors import (
    AggregationAborted,
    JobError,
    LlmosError,
    UnknownJob,
    UpdateRefused,
    VerificationFailed,
)
from llmos.federations import register
from llmos.federations.register import FederatedJob, FederatedState
from llmos.jobs.jobs import public_text
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.workflows import coordinated_round, publish_federated, running_federation
from llmos.workflows.ended_federations import EndedFederations
from llmos.workflows.federated_round import UPLOAD
from llmos.workflows.federated_state import weights_bytes, weights_sha256
from llmos.workflows.masked_round import MaskedAttempt
from llmos.workflows.parts import Parts
from llmos.workflows.running_federation import Running, read_answer
from llmos.workflows.validation import Validation

LIVE_S: Final = 30.0  # a site that was not heard of for so long takes no part in a new attempt
PHASE_S: Final = 60.0  # for what takes a site no training
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
            details = {"job": job_id, "site": site, "accepted": said["accepted"]}
            with self._act(details) as conn:
                register.keep_answer(conn, job_id, site, envelope)
            run.answers[site] = said
            if run.attempt is None:
                run.began = time.monotonic()  # those that have not answered get their time
            word = "takes part" if said["accepted"] else f"does not take part: {said['reason']}"
            self._tell(f"{job_id}: {site} {word}")
            if run.attempt is not None and not said["accepted"]:
                self._abort(run, f"{site} has left")
            elif before is not None and isinstance(run.attempt, MaskedAttempt):
                # an agent that began anew has lost the secrets of the attempt under way
                self._abort(run, f"{site} has come back")
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
                self._note_refusal(job_id, refused)
                raise
            run.bytes_up[site] = run.bytes_up.get(site, 0) + len(body)
            if run.attempt is not None and run.attempt.phase != before:
                run.phase_began = time.monotonic()
            self._conclude(run)
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

    def largest_body(self, site: str, job_id: str) -> int:
        """Return how many bytes the next message of a job may have.

        Raises:
            UnknownJob: the site has no such job.
        """
        with self._lock:
            attempt = self._of(site, job_id).attempt
            return 0 if attempt is None else attempt.largest_body()

    def refuse(self, site: str, job_id: str, why: str) -> NoReturn:
        """Refuse a message that was not read to its end.

        Raises:
            UpdateRefused: always; the site is named in the log.
        """
        with self._lock:
            refused = UpdateRefused(site, why)
            self._note_refusal(job_id, refused)
            raise refused

    # what time brings

    def tick(self) -> None:
        """Take up new jobs, close what is over time, begin what can begin."""
        with self._lock:
            self._reload()
            for run in list(self._running.values()):
                try:
                    self._advance(run)
                except LlmosError as error:
                    self._end(run, FederatedState.FAILED, error.message)

    # inside

    def _note_refusal(self, job_id: str, refused: UpdateRefused) -> None:
        self._record({"job": job_id, "refused": refused.site, "why": refused.message})
        self._tell(f"{job_id}: {refused.message}")

    def _of(self, site: str, job_id: str) -> Running:
        run = self._running.get(job_id)
        if run is None or site not in run.job.manifest.sites:
            raise UnknownJob(f"there is no running job {job_id!r} of {site}")
        return run

    def _reload(self) -> None:
        for job in register.jobs(self._parts.kernel.store):
            if job.state is FederatedState.RUNNING and job.id not in self._running:
                run = running_federation.load(job, self._who, self._parts)
                run.judge = self._judge_of(job)
                self._running[job.id] = run
                self._tell(f"{job.id}: offered to {len(job.manifest.sites)} sites")
                self._bump()
            elif job.state is not FederatedState.RUNNING and job.id not in self._ended:
                self._note_end(job.id)

    def _judge_of(self, job: FederatedJob) -> Validation | None:
        if job.validation is None:
            return None
        judge = Validation(job.manifest, job.validation, self._who, self._parts, self._tell)
        judge.start()
        return judge

    def _advance(self, run: Running) -> None:
        manifest, now = run.job.manifest, time.monotonic()
        if run.finishing:
            return
        if run.state.round >= manifest.rounds:
            run.finishing = True
            threading.Thread(target=self._publish, args=(run,), name=run.job.id).start()
            return
        if run.attempt is not None:
            allowed = manifest.deadline_s if run.attempt.phase == UPLOAD else PHASE_S
            missing = run.attempt.missing()
            gone = all(now - self._heard.get(site, run.phase_began) > LIVE_S for site in missing)
            if now - run.phase_began > allowed or (missing and gone):
                late = ", ".join(run.attempt.missing())
                self._tell(f"{run.job.id}: round {run.state.round + 1}: late: {late}")
                try:
                    run.attempt.close_phase()
                    run.phase_began = now
                except AggregationAborted as aborted:
                    self._abort(run, aborted.message)
                self._conclude(run)
                self._bump()
            return
        willing = {
            site: int(said["units"])
            for site, said in run.answers.items()
            if said["accepted"] and now - self._heard.get(site, -LIVE_S) < LIVE_S
        }
        refused = [site for site, said in run.answers.items() if not said["accepted"]]
        if len(manifest.sites) - len(refused) < manifest.minimum_sites:
            raise JobError(f"too few sites are left: {', '.join(refused)} said no")
        # who took no part in the last round is not waited for before each one; who is back, joins
        wanted = set(manifest.sites if run.last is None else run.last) - set(refused)
        everybody = wanted <= set(willing)
        if len(willing) >= manifest.minimum_sites and (everybody or now - run.began > LIVE_S):
            self._begin(run, willing)

    def _begin(self, run: Running, willing: Mapping[str, int]) -> None:
        coordinated_round.begin(run, willing, self._who, self._parts)
        self._tell(
            f"{run.job.id}: round {run.state.round + 1} of {run.job.manifest.rounds}, "
            f"attempt {run.attempts}, {len(willing)} sites"
        )
        self._bump()

    def _abort(self, run: Running, why: str) -> None:
        self._tell(f"{run.job.id}: round {run.state.round + 1} begins again: {why}")
        self._record({"job": run.job.id, "round": run.state.round, "aborted": why})
        run.attempt = None
        run.began = time.monotonic()

    def _conclude(self, run: Running) -> None:
        """Keep the mean of a finished attempt, if it is finished, and go on."""
        facts = coordinated_round.conclude(run, self._who, self._parts)
        if facts is None:
            return
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
        except LlmosError as error:
            why = error.message
        except Exception as error:  # noqa: BLE001 - else the job would stay as if it ran
            why = public_text(error)
        else:
            self._tell(f"{run.job.id}: done: model {result['model']}")
            with self._lock:
                self._note_end(run.job.id)
            return
        with self._lock:
            self._end(run, FederatedState.FAILED, why)

    def _end(self, run: Running, state: FederatedState, why: str) -> None:
        details = {"job": run.job.id, "ended": str(state), "why": why}
        with self._act(details) as conn:
            register.end(conn, run.job, state, why)
        if run.job.checkpoint is not None:
            self._parts.kernel.vault.delete(run.job.checkpoint)
        self._tell(f"{run.job.id}: {state}: {why}")
        self._note_end(run.job.id)

    def _note_end(self, job_id: str) -> None:
        """Remember an ended job, for its sites to hear of it and to fetch what it has learnt."""
        run = self._running.pop(job_id, None)
        if run is not None and run.judge is not None:
            run.judge.end()
        self._ended.add(job_id)
        self._bump()

    def _act(self, details: Mapping[str, Any]) -> Any:  # noqa: ANN401 - a context manager
        kernel = self._parts.kernel
        return kernel.monitor.act(self._who, Action.COORDINATE, kernel.home, details=details)

    def _record(self, details: Mapping[str, Any]) -> None:
        with self._act(details):
            pass

    def _bump(self) -> None:
        self.version += 1
        for run in self._running.values():
            self._show(run)
        self._changed()

    def _show(self, run: Running) -> None:
        """Let `llmos federate show` see the attempt under way, when it has changed."""
        status = run.status()
        if status != run.told:
            run.told = status
            with self._parts.kernel.store.transaction() as conn:
                register.tell(conn, run.job.id, status)
