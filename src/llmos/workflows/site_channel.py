"""What a site says to its coordinator, and fetches there: calls over mutual TLS, one each."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
import rfc8785
from numpy.typing import NDArray

from llmos.crypto import dsse
from llmos.crypto.notes import Verifier
from llmos.errors import CertificateRefused, NetworkError, RequestError, VerificationFailed
from llmos.federations import invitations
from llmos.federations.invitations import Invitation
from llmos.federations.manifest import ANSWER_TYPE, Manifest
from llmos.parties import memberships
from llmos.parties.exchange import call
from llmos.parties.memberships import Membership
from llmos.parties.tls import Credentials, client_context
from llmos.workflows.federated_round import Task
from llmos.workflows.parts import Parts

_KEYS: Final = 2  # lines of a home's public keys: certificates, log
_ANSWER_BYTES: Final = 1 << 22  # instructions of all jobs of a site
_FLOAT_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class SiteChannel:
    """The way to one coordinator; every call may raise NetworkError or CertificateRefused."""

    organisation: str
    parts: Parts

    @property
    def member(self) -> Membership:
        """Return this site's membership, with what `llmos party renew` has fetched since."""
        return memberships.membership(self.organisation, self.parts.kernel)

    def coordinator_key(self) -> Verifier:
        """Fetch the coordinator's public keys over TLS of the pinned CA; insist on them later.

        Raises:
            CertificateRefused: they are others than at the first contact.
            VerificationFailed: they cannot be read.
        """
        keys = self._call("/federation/keys").decode()
        if len(keys.splitlines()) != _KEYS:
            raise VerificationFailed("the coordinator's public keys cannot be read")
        with self.parts.kernel.store.transaction() as conn:
            invitations.pin_coordinator(conn, self.organisation, keys)
        return Verifier.parse(keys.splitlines()[0])

    def poll(self, instance: str, seen: int) -> tuple[str, int, list[dict[str, Any]]]:
        """Wait for news, a few seconds at most; return where it stands and all instructions.

        Raises:
            RequestError: the answer cannot be read.
        """
        asked = json.dumps({"instance": instance, "seen": seen}).encode()
        try:
            answer = json.loads(self._call("/federation/poll", asked, largest=_ANSWER_BYTES))
            instructions = [_about_a_job(one) for one in answer["instructions"]]
            return str(answer["instance"]), int(answer["version"]), instructions
        except (ValueError, LookupError, TypeError) as error:
            raise RequestError("the coordinator's instructions cannot be read") from error

    def weights(self, job_id: str, digest: str, manifest: Manifest) -> NDArray[np.float32]:
        """Fetch global weights (P,).

        Raises:
            RequestError: they are not those of this digest, or not finite.
        """
        size = _FLOAT_BYTES * manifest.parameters
        content = self._call(f"/federation/jobs/{job_id}/weights/{digest}", largest=size + 1)
        if len(content) != size or hashlib.sha256(content).hexdigest() != digest:
            raise RequestError("the global weights are not those that the coordinator named")
        weights = np.frombuffer(content, dtype="<f4").astype(np.float32)
        if not np.isfinite(weights).all():
            raise RequestError("a global weight is not a finite number")
        return weights

    def send(self, task: Task, phase: str, body: bytes) -> None:
        """Send this site's message of a phase.

        Raises:
            RequestError: the coordinator refuses it.
        """
        path = f"/federation/jobs/{task.job}/rounds/{task.round}/{task.attempt}/{phase}"
        self._call(path, body)

    def answer(
        self,
        job: Invitation,
        *,
        accepted: bool,
        reason: str = "",
        units: int = 0,
        epsilon: float | None = None,
        classification: str = "",
    ) -> None:
        """Say yes, no or no longer to a job, signed by this home's key for certificates.

        Raises:
            RequestError: the coordinator has no such job, or not any more.
        """
        kernel = self.parts.kernel
        said: dict[str, Any] = {
            "job": job.id,
            "manifest_sha256": job.manifest.digest,
            "site": self.member.id.uri,
            "vkey": kernel.certificate_key.vkey,
            "log_vkey": kernel.auditlog.key.vkey,
            "accepted": accepted,
            "reason": reason,
            "units": units,
            "epsilon": epsilon,
            "classification": classification,
            "at": datetime.now(UTC).isoformat(),
        }
        envelope = dsse.sign(rfc8785.dumps(said), ANSWER_TYPE, kernel.certificate_key)
        self._call(f"/federation/jobs/{job.id}/answer", json.dumps(envelope).encode())

    def state(self, job_id: str, part: dict[str, Any]) -> None:
        """Send what this site states after a job.

        Raises:
            RequestError: the coordinator refuses it.
        """
        self._call(f"/federation/jobs/{job_id}/statement", json.dumps(part).encode())

    @property
    def credentials(self) -> Credentials:
        """Return this site's certificate and key.

        Raises:
            CertificateRefused: it has none yet.
        """
        credentials = self.member.terms(self.parts.kernel).credentials
        if credentials is None:
            raise CertificateRefused("this site has no certificate yet", hint="llmos site join URL")
        return credentials

    def _call(self, path: str, body: bytes | None = None, *, largest: int = 1 << 20) -> bytes:
        member = self.member
        context = client_context(member.terms(self.parts.kernel))
        try:
            return call(
                member.url, context, path, body, largest_bytes=largest, refused=RequestError
            )
        except NetworkError as error:
            # A server may close the connection of an expired certificate before its alert is read.
            end = None if member.certificate is None else member.certificate.not_valid_after_utc
            if end is None or datetime.now(UTC) <= end:
                raise
            raise CertificateRefused(
                f"{member.url} closed the connection: this home's certificate expired at {end}",
                hint=f"ask for a new token; then: llmos party leave {self.organisation}, "
                "llmos site join URL --token-file FILE",
            ) from error


def _about_a_job(instruction: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(instruction["job"], str):
        raise TypeError("an instruction names its job by a text")
    return instruction
