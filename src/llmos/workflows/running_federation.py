"""A federated job in a coordinator's memory: what its sites answered, and the attempt under way."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmos.crypto import dsse
from llmos.crypto.notes import Verifier, decode_base64
from llmos.engines.federated.server_optimizer import ServerOptimizer, ServerState
from llmos.errors import RequestError, UpdateRefused, VerificationFailed
from llmos.federations import register
from llmos.federations.manifest import ANSWER_TYPE
from llmos.federations.register import FederatedJob
from llmos.kernel.identity import Principal
from llmos.workflows import federated_state
from llmos.workflows.federated_round import Attempt
from llmos.workflows.parts import Parts
from llmos.workflows.validation import Validation


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

    def check(self, site: str, number: int, attempt: int) -> Attempt:
        """Return the attempt under way, if a message is for it.

        Raises:
            UpdateRefused: it is for another one.
        """
        if self.attempt is None or (number, attempt) != (self.state.round, self.attempts):
            raise UpdateRefused(site, f"round {number}, attempt {attempt} is over")
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

    @property
    def accepted(self) -> list[str]:
        """Return the sites that have said yes."""
        return sorted(site for site, said in self.answers.items() if said["accepted"])


def load(job: FederatedJob, who: Principal, parts: Parts) -> Running:
    """Take up a job as its home has it.

    Raises:
        TamperedObject: its checkpoint was changed.
    """
    read = register.answers(parts.kernel.store, job.id)
    answers = {site: read_answer(one, site, job.manifest.digest) for site, one in read.items()}
    state = federated_state.load(job, who, parts)
    # no attempt has the number of an earlier one, also of a process that was killed
    told = job.status or {}
    attempts = int(told["attempt"]) if told.get("round") == state.round else 0
    optimizer = federated_state.optimizer(job.manifest.server)
    began = time.monotonic()
    return Running(job, state, optimizer, answers, attempts=attempts, began=began)


def read_answer(envelope: Mapping[str, Any], site: str, manifest_sha256: str) -> dict[str, Any]:
    """Return what a site has signed about a job, by the key that it names in it.

    Raises:
        VerificationFailed: the signature is wrong, or it is about another manifest or site.
        RequestError: it is no answer.
    """
    try:
        said = json.loads(decode_base64(str(envelope.get("payload", ""))))
        fields = {name: said[name] for name in ("vkey", "site", "manifest_sha256", "accepted")}
        units, reason = int(said["units"]), str(said["reason"])
    except (ValueError, LookupError, TypeError) as error:
        raise RequestError("this is no answer to a federated job") from error
    dsse.open_envelope(envelope, Verifier.parse(str(fields["vkey"])), payload_type=ANSWER_TYPE)
    if (fields["site"], fields["manifest_sha256"]) != (site, manifest_sha256):
        raise VerificationFailed("the answer is another site's, or about another manifest")
    if not isinstance(fields["accepted"], bool) or (fields["accepted"] and units < 1):
        raise RequestError("this is no answer to a federated job")
    epsilon = said.get("epsilon")
    if epsilon is not None and not isinstance(epsilon, float | int):
        raise RequestError("this is no answer to a federated job")
    return {**said, "units": units, "reason": reason, "epsilon": epsilon}
