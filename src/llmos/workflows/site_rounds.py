"""What a site does in the rounds of one job, and what it remembers between them.

Nothing here is kept on disk but the sum that shares were given to unmask; an agent that begins
anew is told to begin the attempt again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np

from llmos.errors import CertificateRefused, RequestError
from llmos.federations import invitations
from llmos.federations.manifest import Manifest, Masked
from llmos.parties import signatures, trust
from llmos.parties.peers import Anchor
from llmos.workflows import masked_round
from llmos.workflows.federated_round import UPLOAD, Task, Vector, encode
from llmos.workflows.federated_state import start_sha256
from llmos.workflows.masked_round import MaskedPart
from llmos.workflows.parts import Parts
from llmos.workflows.site_channel import SiteChannel
from llmos.workflows.site_training import SiteTraining


@dataclass(slots=True)
class _Feedback:
    """What quantisation has left out, to be added to the update of the next round.

    Every attempt at a round encodes the same: what the first one left out is in no mean yet.
    """

    _round: int | None = None  # that was encoded last
    _before: Vector | None = None  # what is added to it
    _after: Vector | None = None  # what it leaves

    def encode(self, update: Vector, manifest: Manifest, task: Task) -> bytes:
        """Return the update of a round in the clear as bytes."""
        if task.round != self._round:
            self._round, self._before = task.round, self._after
        body, self._after = encode(update, self._before, manifest, task)
        return body


@dataclass(slots=True)
class SiteRounds:
    """One job at work, round after round."""

    training: SiteTraining
    channel: SiteChannel
    parts: Parts
    tell: Callable[[str], None]
    units: int = 0
    _feedback: _Feedback = field(default_factory=_Feedback)
    _sent: set[tuple[int, int, str]] = field(default_factory=set)
    _pending: tuple[Task, object] | None = None  # an upload that waits for its training
    _part: MaskedPart | None = None  # of the attempt under way
    _attempt: tuple[int, int] | None = None
    _made: tuple[tuple[int, int, str], bytes] | None = None  # a masked message, perhaps not arrived

    @property
    def manifest(self) -> Manifest:
        """Return what the job runs."""
        return self.training.job.manifest

    @property
    def site(self) -> str:
        """Return this site's SPIFFE ID."""
        return self.channel.member.id.uri

    def check(self, task: Task) -> None:
        """Check that a signed task is one of this job and weighs this site rightly.

        Raises:
            RequestError: it is not, or does not.
        """
        manifest = self.manifest
        known = set(task.participants) <= set(manifest.sites)
        enough = len(task.participants) >= manifest.minimum_sites
        if task.manifest_sha256 != manifest.digest or not (known and enough):
            raise RequestError(f"the task of round {task.round} is not one of {manifest.id}")
        if task.participants.get(self.site) != self.units:
            raise RequestError(f"the task of round {task.round} weighs this site wrongly")
        kept = invitations.invitation(self.parts.kernel.store, manifest.id).update_round
        if not 0 <= task.round < manifest.rounds or (kept is not None and task.round < kept):
            raise RequestError(f"round {task.round} of {manifest.id} is over here")
        if task.round == 0 and task.weights_sha256 != start_sha256(manifest.parameters):
            raise RequestError(f"{manifest.id} does not start from the base model as it is")

    def do(self, phase: str, task: Task, message: object) -> None:
        """Do what a phase asks; training goes on beside the first ones.

        Raises:
            NetworkError, RequestError: the coordinator is not there, or asks what is not right.
            UpdateRefused, AggregationAborted: another site's message is no good.
        """
        this = (task.round, task.attempt, phase)
        if this in self._sent:
            return
        if self._made is not None and self._made[0] == this:
            self._send(task, phase, self._made[1])
            return
        self._train(task)
        if phase == UPLOAD:
            self._pending = (task, message)
            self.upload()
            return
        body = self._masked(phase, task, message)
        self._made = this, body
        self._send(task, phase, body)

    def upload(self) -> None:
        """Send an update that is asked for, once it is trained."""
        if self._pending is None:
            return
        task, message = self._pending
        update = self.training.update(task.round)
        if update is None:
            return
        self._pending = None
        if isinstance(self.manifest.aggregation, Masked):
            if self._part is None or self._attempt != (task.round, task.attempt):
                raise RequestError(f"round {task.round} was not begun here")
            body = self._part.upload(message, update)
            self._made = (task.round, task.attempt, UPLOAD), body
        else:
            body = self._feedback.encode(update.astype(np.float32, copy=False), self.manifest, task)
        self._send(task, UPLOAD, body)
        self.tell(f"{self.manifest.id}: round {task.round + 1}: sent {len(body):,} bytes")

    def _send(self, task: Task, phase: str, body: bytes) -> None:
        """Send a message; one that does not arrive is asked for again, and then sent again.

        A step of secure aggregation is taken once: no second message is made for it.
        """
        self.channel.send(task, phase, body)
        self._sent.add((task.round, task.attempt, phase))

    def _train(self, task: Task) -> None:
        """Begin to train a round with the global weights that its task names."""
        if not self.training.asked(task.round):
            weights = self.channel.weights(task.job, task.weights_sha256, self.manifest)
            self.training.train(task, weights)

    def _masked(self, phase: str, task: Task, message: object) -> bytes:
        """Return this site's message of a phase of secure aggregation."""
        if self._part is None or self._attempt != (task.round, task.attempt):
            key = self.channel.credentials.key
            self._part = MaskedPart(
                task, self.manifest, self.site, lambda statement: signatures.sign(key, statement)
            )
            self._attempt = (task.round, task.attempt)
        match phase:
            case masked_round.ADVERTISE:
                return self._part.advertise(self._verifier_of(message, task))
            case masked_round.SHARE:
                return self._part.share(message)
            case masked_round.CONFIRM:
                return self._part.confirm(message, lambda sites: self.note_release(task, sites))
            case masked_round.UNMASK:
                return self._part.unmask(message)
        raise RequestError(f"the coordinator asks for {phase!r}, which there is not")

    def _verifier_of(self, message: object, task: Task) -> signatures.Verify:
        """Believe the other sites' certificates as this home believes any party's."""
        certificates = message.get("certificates") if isinstance(message, dict) else None
        if not isinstance(certificates, dict) or set(certificates) != set(task.participants):
            raise RequestError("the coordinator does not show the certificates of all sites")
        anchors, at = trust.anchors(self.parts.kernel), datetime.now(UTC)
        shown = {uri: _believed(uri, pem, anchors, at) for uri, pem in certificates.items()}
        return lambda party, text, signature: (
            party in shown and shown[party](party, text, signature)
        )

    def note_release(self, task: Task, sites: tuple[str, ...]) -> None:
        """Note, before anything is signed, whose sum this site will help to unmask.

        Raises:
            UpdateRefused: this site has helped to unmask another sum of this round, or has trained
                another round since.
        """
        with self.parts.kernel.store.transaction() as conn:
            invitations.release(conn, self.manifest.id, task.round, sites)


def _believed(
    uri: str, certificate: object, anchors: tuple[Anchor, ...], at: datetime
) -> signatures.Verify:
    """Return what checks a party's signatures, if the certificate shown for it is good.

    Raises:
        RequestError: it is not. Only this site's own certificate, which is shown to the
            coordinator, ends its agent.
    """
    if not isinstance(certificate, str):
        raise RequestError(f"the certificate that the coordinator shows for {uri} is no text")
    try:
        return signatures.verifier({uri: certificate}, anchors, at)
    except CertificateRefused as error:
        raise RequestError(
            f"the certificate that the coordinator shows for {uri} is no good: {error.message}"
        ) from error
