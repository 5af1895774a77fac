"""A federated job in a coordinator's memory: what its sites answered, and the attempt under way."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from llmos.crypto import dsse
from llmos.crypto.notes import Verifier, decode_base64
from llmos.engines.federated.server_optimizer import ServerOptimizer, ServerState
from llmos.errors import JobError, RequestError, UpdateRefused, VerificationFailed
from llmos.federations import manifest as manifests
from llmos.federations import register
from llmos.federations.manifest import ANSWER_TYPE
from llmos.federations.register import FederatedJob
from llmos.kernel.identity import Principal
from llmos.workflows import federated_state
from llmos.workflows.federated_round import UPLOAD, Attempt
from llmos.workflows.masked_round import MaskedAttempt
from llmos.workflows.parts import Parts
from llmos.workflows.validation import Validation

LIVE_S: Final = 30.0  # a site that was not heard of for so long takes no part in a new attempt
PHASE_S: Final = 60.0  # for what takes a site no training
_MOST_RETURNS: Final = 3  # of a site in one round
_MOST_UNITS: Final = 10**10  # more than there are people; JSON's numbers end at 2**53
_MOST_EPSILON: Final = 1e300
_LONGEST_REASON: Final = 300


@dataclass(slots=True)
class Running:
    """A job in memory."""

    job: FederatedJob
    state: ServerState
    optimizer: ServerOptimizer
    answers: dict[str, dict[str, Any]]  # what each site signed last, read
    attempt: Attempt | None = None
    attempts: int = 0  # at the present round
    last: tuple[str, ...] | None = None  # sites in the last round that this process has finished
    began: float = 0.0
    phase_began: float = 0.0
    bytes_up: dict[str, int] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)  # the signed task of the attempt
    finishing: bool = False
    judge: Validation | None = None  # where the coordinator has data to try the model on
    returns: dict[str, int] = field(default_factory=dict)  # how often a site upset this round
    shown: tuple[str, ...] = ()  # whose sum an aborted attempt at this round was to unmask

    def check(self, site: str, number: int, attempt: int) -> Attempt:
        """Return the attempt under way, if a message is for it.

        Raises:
            UpdateRefused: it is for another one.
        """
        if self.attempt is None or (number, attempt) != (self.state.round, self.attempts):
            raise UpdateRefused(
                site, f"it came too late: round {number}, attempt {attempt} is over"
            )
        return self.attempt

    def instruction(self, site: str) -> dict[str, Any] | None:
        """Return what a site has to know and to do now; None where it has no part in the job."""
        if site not in self.job.manifest.sites:
            return None
        common: dict[str, Any] = {"job": self.job.id}
        if site not in self.answers:
            return common | {"kind": "manifest", "envelope": self.job.signed.envelope}
        message = None if self.attempt is None else self.attempt.message(site)
        if self.attempt is None or message is None:
            return common | {"kind": "wait", "round": self.state.round}
        phase = self.attempt.phase
        return common | {"kind": "round", "phase": phase, "task": self.task, "message": message}

    def status(self) -> dict[str, Any]:
        """Return what people see of the attempt under way."""
        attempt = self.attempt
        return {
            "round": self.state.round,
            "attempt": self.attempts,
            "phase": None if attempt is None else attempt.phase,
            "waiting_for": [] if attempt is None else attempt.missing(),
            "accepted": self.accepted,
        }

    def take_answer(self, site: str, said: dict[str, Any]) -> str | None:
        """Keep what a site says, and return why the attempt under way begins again, if it does.

        A site that comes back has lost the secrets of the attempt. It may do so a few times in a
        round; then the round goes on without it, or, if it is needed, waits for its deadlines.
        """
        self.answers[site] = said
        if self.attempt is None:
            self.began = time.monotonic()  # those that have not answered get their time
            return None
        loses_it = not said["accepted"] or isinstance(self.attempt, MaskedAttempt)
        if site not in self.attempt.task.participants or not loses_it:
            return None
        self.returns[site] = self.returns.get(site, 0) + 1
        if not said["accepted"]:
            return f"{site} has left"
        if not self._is_restless(site):
            return f"{site} has come back"
        others = [one for one in self.accepted if not self._is_restless(one)]
        if len(others) >= self.job.manifest.minimum_sites:
            return f"{site} comes back again and again and is left out of this round"
        return None

    def is_overdue(self, missing: Collection[str], heard: Mapping[str, float]) -> bool:
        """Tell whether the present phase goes on without the sites that are missing."""
        now, phase = time.monotonic(), None if self.attempt is None else self.attempt.phase
        allowed = self.job.manifest.deadline_s if phase == UPLOAD else PHASE_S
        gone = all(now - heard.get(site, self.phase_began) > LIVE_S for site in missing)
        return now - self.phase_began > allowed or (bool(missing) and gone)

    def willing(self, heard: Mapping[str, float]) -> dict[str, int]:
        """Return the sites that a new attempt can count on, with their units.

        Args:
            heard: when sites were heard of last, by the monotonic clock.
        """
        now = time.monotonic()
        here = {
            site: int(self.answers[site]["units"])
            for site in self.accepted
            if now - heard.get(site, -LIVE_S) < LIVE_S
        }
        steady = {site: units for site, units in here.items() if not self._is_restless(site)}
        return steady if len(steady) >= self.job.manifest.minimum_sites else here

    def is_ready(self, willing: Collection[str]) -> bool:
        """Tell whether an attempt with these sites begins now, or others are waited for.

        Raises:
            JobError: too many sites have said no.
        """
        manifest = self.job.manifest
        refused = [site for site, said in self.answers.items() if not said["accepted"]]
        if len(manifest.sites) - len(refused) < manifest.minimum_sites:
            raise JobError(f"too few sites are left: {', '.join(refused)} said no")
        if len(willing) < manifest.minimum_sites:
            return False
        # who took no part in the last round is not waited for before each one; who is back, joins
        wanted = set(manifest.sites if self.last is None else self.last) - set(refused)
        waited_for = {site for site in wanted - set(willing) if not self._is_restless(site)}
        return not waited_for or time.monotonic() - self.began > LIVE_S

    def participants(self, willing: Mapping[str, int]) -> dict[str, int]:
        """Return who of those that are willing takes part.

        Sites that have helped to unmask one sum of this round, or were about to, help to unmask no
        other: where all of that sum are there, it is the same sites again.
        """
        enough = len(self.shown) >= self.job.manifest.minimum_sites
        if not (enough and set(self.shown) <= set(willing)):
            return dict(willing)
        return {site: willing[site] for site in self.shown}

    def _is_restless(self, site: str) -> bool:
        return self.returns.get(site, 0) > _MOST_RETURNS

    @property
    def accepted(self) -> list[str]:
        """Return the sites that have said yes."""
        return sorted(site for site, said in self.answers.items() if said["accepted"])


def load(job: FederatedJob, who: Principal, parts: Parts, tell: Callable[[str], None]) -> Running:
    """Take up a job as its home has it, with its judge where there is one.

    A kept answer that is none any more counts as none: its site is asked again.

    Raises:
        TamperedObject, EngineError: its checkpoint was changed.
        VerificationFailed: an answer was changed.
        RequestError: its manifest must not run.
    """
    manifests.check(job.manifest)
    answers = {}
    for site, envelope in register.answers(parts.kernel.store, job.id).items():
        with suppress(RequestError):
            answers[site] = read_answer(envelope, site, job.manifest.digest)
    state = federated_state.load(job, who, parts)
    # no attempt has the number of an earlier one, also of a process that was killed
    told = job.status or {}
    attempts = int(told["attempt"]) if told.get("round") == state.round else 0
    optimizer = federated_state.optimizer(job.manifest.server)
    run = Running(job, state, optimizer, answers, attempts=attempts, began=time.monotonic())
    if job.validation is not None:
        run.judge = Validation(job.manifest, job.validation, who, parts, tell)
        run.judge.start()
    return run


def read_answer(envelope: Mapping[str, Any], site: str, manifest_sha256: str) -> dict[str, Any]:
    """Return what a site has signed about a job, by the key that it names in it.

    Raises:
        VerificationFailed: the signature is wrong, or it is about another manifest or site.
        RequestError: it is no answer.
    """
    try:
        said = json.loads(decode_base64(str(envelope.get("payload", ""))))
        fields = {name: said[name] for name in ("vkey", "site", "manifest_sha256", "accepted")}
        units, reason, epsilon = said["units"], str(said["reason"]), said.get("epsilon")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise _no_answer(site, "a field is missing") from error
    dsse.open_envelope(envelope, Verifier.parse(str(fields["vkey"])), payload_type=ANSWER_TYPE)
    if (fields["site"], fields["manifest_sha256"]) != (site, manifest_sha256):
        raise VerificationFailed("the answer is another site's, or about another manifest")
    if not isinstance(fields["accepted"], bool):
        raise _no_answer(site, "it says neither yes nor no")
    if type(units) is not int or not int(fields["accepted"]) <= units <= _MOST_UNITS:
        raise _no_answer(site, f"its units are no number up to {_MOST_UNITS}")
    if epsilon is not None and not _is_epsilon(epsilon):
        raise _no_answer(site, "its epsilon is none")
    return {**said, "units": units, "reason": _shown(reason), "epsilon": epsilon}


def _no_answer(site: str, why: str) -> RequestError:
    return RequestError(f"what {site} says is no answer to a federated job: {why}")


def _is_epsilon(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value < _MOST_EPSILON


def _shown(reason: str) -> str:
    """Return a site's words as one line that does nothing to the terminal of who reads it."""
    return "".join(c if c.isprintable() else " " for c in reason[:_LONGEST_REASON])
