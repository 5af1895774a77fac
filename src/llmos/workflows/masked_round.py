"""A round under secure aggregation: the coordinator's attempt and the site's part in it.

The protocol is `engines.federated`'s; here are its channel and its identities. Each phase of the
protocol is one message of each site, and the coordinator's answer to all of them opens the next.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from llmos.engines.federated import fixed_point
from llmos.engines.federated.aggregator import Aggregator
from llmos.engines.federated.codec import Encoding, Header
from llmos.engines.federated.fixed_point import FixedPoint
from llmos.engines.federated.messages import (
    Advertisement,
    Delivery,
    Message,
    Roster,
    SealedShares,
    Survivors,
    SurvivorSignature,
    SurvivorSignatures,
    UnmaskingShares,
)
from llmos.engines.federated.secure_aggregation import Participant
from llmos.engines.federated.session import Session, Sign, Verify
from llmos.engines.federated.shared_noise import SharedNoise
from llmos.errors import RequestError, UpdateRefused
from llmos.federations.manifest import Manifest, Masked
from llmos.workflows.federated_round import UPLOAD, Mean, Task, Update, new

ADVERTISE, SHARE, CONFIRM, UNMASK = "advertise", "share", "confirm", "unmask"
_PHASES: Final = (ADVERTISE, SHARE, UPLOAD, CONFIRM, UNMASK, "done")
# Adam moves a weight by about the learning rate a step; twice that is cut off hardly ever.
_HEADROOM: Final = 2.0
_MOST_JSON_BYTES: Final = 1 << 22


def session_of(task: Task, manifest: Manifest) -> tuple[Session, FixedPoint]:
    """Return what coordinator and sites must agree on, from the signed task and manifest alone."""
    assert isinstance(manifest.aggregation, Masked)  # noqa: S101 - asked for such jobs only
    if manifest.shared_noise is not None:
        fixed = grid_of(task, manifest).fixed
    else:
        limit = _HEADROOM * manifest.local.learning_rate * manifest.local.steps
        fixed = FixedPoint(limit, manifest.aggregation.bits, len(task.participants))
    update = Header(
        encoding=Encoding.INTEGERS,
        layout=bytes.fromhex(manifest.layout),
        entries=manifest.parameters,
        round=task.round,
        attempt=task.attempt,
        bits=fixed.modulus_bits,
    )
    sites = tuple(sorted(task.participants))
    return Session(task.job, sites, manifest.aggregation.threshold, update), fixed


def grid_of(task: Task, manifest: Manifest) -> SharedNoise:
    """Return the grid and the noise of a job whose sites share it."""
    privacy = manifest.privacy
    assert privacy is not None  # noqa: S101 - asked for such jobs only
    assert privacy.shared is not None  # noqa: S101
    return SharedNoise(
        clip_norm=privacy.clip,
        multiplier=privacy.shared.multiplier,
        honest=privacy.shared.honest,
        entries=manifest.parameters,
        sites=len(task.participants),
    )


def weight_of(task: Task, manifest: Manifest, site: str) -> float:
    """Return what a site counts in the mean, in what it is divided by.

    Its units, against those of the largest site, by which it multiplies its update. Where the sites
    share noise each unit counts the same, so that each site counts the units that it draws.
    """
    if manifest.shared_noise is not None:
        return float(min(manifest.local.batch, task.participants[site]))
    return task.participants[site] / max(task.participants.values())


@dataclass(slots=True)
class MaskedAttempt:
    """The coordinator's side; it learns the sum and who is in it."""

    task: Task
    manifest: Manifest
    certificates: Mapping[str, str]  # PEM by site, for the sites to check each other's signatures
    verify: Verify
    phase: str = ADVERTISE
    _aggregator: Aggregator = field(init=False)
    _session: Session = field(init=False)
    _fixed: FixedPoint = field(init=False)
    _expected: tuple[str, ...] = field(init=False)
    _digests: dict[str, dict[str, bytes]] = field(default_factory=dict)
    _messages: dict[str, dict[str, Any]] = field(default_factory=dict)
    _sites: tuple[str, ...] = ()
    _total: NDArray[np.uint32] | None = None

    def __post_init__(self) -> None:
        """Ask every participant for its keys."""
        self._session, self._fixed = session_of(self.task, self.manifest)
        self._aggregator = Aggregator(self._session, self.verify)
        self._expected = self._session.sites
        first = {"certificates": dict(self.certificates)}
        self._messages = dict.fromkeys(self._expected, first)

    def message(self, site: str) -> dict[str, Any] | None:
        """Return what a site needs for its next message."""
        return self._messages[site] if site in self.missing() else None

    def missing(self) -> list[str]:
        """Return the sites whose message of this phase has not come."""
        return sorted(set(self._expected) - set(self._digests.get(self.phase, {})))

    def receive(self, site: str, phase: str, body: bytes) -> None:
        """Take a site's message, and go on to the next phase when it was the last one."""
        if not new(self._digests.get(phase, {}), site, body):
            return
        if phase != self.phase or site not in self._expected:
            raise UpdateRefused(site, f"nothing of it is expected in {phase!r} now")
        add = self._aggregator
        match phase:
            case "advertise":
                add.add_advertisement(Advertisement.from_dict(_json(body, site), site))
            case "share":
                add.add_shares(SealedShares.from_dict(_json(body, site), site))
            case "upload":
                add.add_input(site, body)
            case "confirm":
                add.add_signature(SurvivorSignature.from_dict(_json(body, site), site))
            case "unmask":
                add.add_unmasking(UnmaskingShares.from_dict(_json(body, site), site))
        self._digests.setdefault(phase, {})[site] = hashlib.sha256(body).digest()
        if not self.missing():
            self.close_phase()

    def close_phase(self) -> None:
        """Open the next phase to those that are left."""
        heard = tuple(sorted(self._digests.get(self.phase, {})))
        aggregator, answers = self._aggregator, dict[str, Message]()
        match self.phase:
            case "advertise":
                answers = dict.fromkeys(heard, aggregator.roster())
            case "share":
                answers = dict(aggregator.deliveries())
            case "upload":
                answers = dict.fromkeys(heard, aggregator.survivors())
                self._sites = heard
            case "confirm":
                answers = dict.fromkeys(heard, aggregator.signatures())
            case "unmask":
                self._total = aggregator.total()
        self._expected = tuple(answers)
        self._messages = {site: answer.to_dict() for site, answer in answers.items()}
        self.phase = _PHASES[_PHASES.index(self.phase) + 1]

    def result(self) -> Mean | None:
        """Return the mean of the survivors' updates."""
        if self._total is None:
            return None
        total = fixed_point.from_residues(self._total, self._fixed)
        weight = sum(weight_of(self.task, self.manifest, site) for site in self._sites)
        if self.manifest.shared_noise is not None:
            # downhill, in units in which a gradient as long as the clip moves each weight by 1
            assert self.manifest.privacy is not None  # noqa: S101 - it has the noise
            weight *= -self.manifest.privacy.clip / math.sqrt(self.manifest.parameters)
        return Mean((total / weight).astype(np.float32), self._sites)

    def largest_body(self, phase: str) -> int:
        """Return the size of a masked vector, or what JSON messages may have."""
        return self._session.update.total_bytes if phase == UPLOAD else _MOST_JSON_BYTES

    @property
    def survivors(self) -> tuple[str, ...]:
        """Return the sites whose sum is to be unmasked; nobody before all inputs are there."""
        return self._sites


class MaskedPart:
    """A site's side of one attempt."""

    def __init__(self, task: Task, manifest: Manifest, site: str, sign: Sign) -> None:
        """Begin; the other sites' certificates come with the first message."""
        self._session, self._fixed = session_of(task, manifest)
        self._task, self._manifest, self._site, self._sign = task, manifest, site, sign
        self._participant: Participant | None = None

    def advertise(self, verify: Verify) -> bytes:
        """Give this site's keys."""
        self._participant = Participant(self._session, self._site, sign=self._sign, verify=verify)
        return _bytes(self._participant.advertise())

    def share(self, message: object) -> bytes:
        """Give everyone's shares of this site's secrets, sealed."""
        return _bytes(self._begun.share_keys(Roster.from_dict(message)))

    def upload(self, message: object, update: Update) -> bytes:
        """Give the masked update."""
        if update.dtype == np.int32:
            residues = update.view(np.uint32).copy()
        else:
            weight = weight_of(self._task, self._manifest, self._site)
            residues = fixed_point.to_residues(
                update.astype(np.float32, copy=False),
                self._fixed,
                fixed_point.fresh_generator(),
                weight=weight,
            )
        return self._begun.mask(Delivery.from_dict(message), residues)

    def confirm(self, message: object, check: Callable[[tuple[str, ...]], None]) -> bytes:
        """Sign the list of survivors, unless `check` raises an objection to it."""
        survivors = Survivors.from_dict(message)
        check(survivors.sites)
        return _bytes(self._begun.sign_survivors(survivors))

    def unmask(self, message: object) -> bytes:
        """Give shares to unmask the sum."""
        return _bytes(self._begun.unmask(SurvivorSignatures.from_dict(message)))

    @property
    def _begun(self) -> Participant:
        if self._participant is None:
            raise RequestError("the coordinator goes on with a round that it has not begun here")
        return self._participant


def _bytes(message: Message) -> bytes:
    return json.dumps(message.to_dict()).encode()


def _json(body: bytes, site: str) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UpdateRefused(site, "it is no JSON") from error
