"""One attempt at one round, at the coordinator: who owes what, what came, and what it adds up to.

Nothing here is kept on disk: a coordinator that dies begins the round again from its checkpoint,
and the sites send the updates that they have.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from llmos.engines.federated import quantisation
from llmos.engines.federated.codec import (
    Encoding,
    Header,
    decode_update,
    encode_blocks,
    encode_floats,
)
from llmos.engines.federated.server_optimizer import weighted_mean
from llmos.errors import AggregationAborted, UpdateRefused
from llmos.federations.manifest import Manifest, Plain

UPLOAD: Final = "upload"
ROUND_TYPE: Final = "application/vnd.llmos.federated-round+json"
Vector = NDArray[np.float32]
Update = NDArray[np.float32] | NDArray[np.int32]  # noisy integers where the sites share noise


@dataclass(frozen=True, slots=True)
class Task:
    """What one attempt asks of its sites; the coordinator signs it."""

    job: str
    manifest_sha256: str
    round: int
    attempt: int
    weights_sha256: str
    participants: Mapping[str, int]  # sites and their units: the weights of the mean

    def to_dict(self) -> dict[str, Any]:
        """Return the task as JSON values."""
        return {
            "job": self.job,
            "manifest_sha256": self.manifest_sha256,
            "round": self.round,
            "attempt": self.attempt,
            "weights_sha256": self.weights_sha256,
            "participants": dict(self.participants),
        }


@dataclass(frozen=True, slots=True, eq=False)
class Mean:
    """What a finished attempt gives: the mean update, weighted by units, and who is in it."""

    update: Vector  # (P,)
    sites: tuple[str, ...]


class Attempt(Protocol):
    """One attempt at a round; not safe for threads: the coordinator holds its lock."""

    phase: str
    task: Task

    @abstractmethod
    def message(self, site: str) -> dict[str, Any] | None:
        """Return what a site that owes something needs to know for it; None if it owes nothing."""

    @abstractmethod
    def receive(self, site: str, phase: str, body: bytes) -> None:
        """Take what a site owes.

        Raises:
            UpdateRefused: it is malformed, out of turn, or another than it sent before.
            AggregationAborted: it was the last one, and the attempt has failed; that is no fault of
                this site.
        """

    @abstractmethod
    def missing(self) -> list[str]:
        """Return the sites that owe something in this phase."""

    @abstractmethod
    def close_phase(self) -> None:
        """Go on without those that are missing.

        Raises:
            AggregationAborted: too few are left.
        """

    @abstractmethod
    def result(self) -> Mean | None:
        """Return the mean once all is there."""

    @abstractmethod
    def largest_body(self, phase: str) -> int:
        """Return how many bytes a message of a phase may have, also one that is over."""


@dataclass(slots=True)
class PlainAttempt:
    """Each site sends its update; the coordinator sees them all."""

    task: Task
    manifest: Manifest
    phase: str = UPLOAD
    _updates: dict[str, Vector] = field(default_factory=dict)
    _digests: dict[str, bytes] = field(default_factory=dict)
    _closed: bool = False

    def message(self, site: str) -> dict[str, Any] | None:
        """Return nothing but the call to send: the task says all."""
        return {} if site in self.missing() else None

    def receive(self, site: str, phase: str, body: bytes) -> None:
        """Take a site's update."""
        if self._closed or phase != UPLOAD or site not in self.task.participants:
            raise UpdateRefused(site, f"nothing of it is expected in {phase!r} now")
        if new(self._digests, site, body):
            self._updates[site] = decode_update(body, header(self.manifest, self.task), site)
            self._digests[site] = hashlib.sha256(body).digest()

    def missing(self) -> list[str]:
        """Return the sites without an update."""
        return [] if self._closed else sorted(set(self.task.participants) - set(self._updates))

    def close_phase(self) -> None:
        """Go on with the updates that are there."""
        if len(self._updates) < self.manifest.minimum_sites:
            raise AggregationAborted(
                f"{len(self._updates)} of at least {self.manifest.minimum_sites} sites have sent "
                "their update in time"
            )
        self._closed = True

    def result(self) -> Mean | None:
        """Return the mean, summed in the order of the sites' names."""
        if self.missing():
            return None
        sites = tuple(sorted(self._updates))
        units = [self.task.participants[site] for site in sites]
        return Mean(weighted_mean([self._updates[site] for site in sites], units), sites)

    def largest_body(self, phase: str) -> int:  # noqa: ARG002 - there is but one
        """Return the size of an update: it is known before."""
        return header(self.manifest, self.task).total_bytes


def header(manifest: Manifest, task: Task) -> Header:
    """Return the header that an update in the clear must have."""
    assert isinstance(manifest.aggregation, Plain)  # noqa: S101 - asked for such jobs only
    bits = manifest.aggregation.bits
    return Header(
        encoding=Encoding.FLOAT32 if bits == 32 else Encoding.BLOCKS,  # noqa: PLR2004
        layout=bytes.fromhex(manifest.layout),
        entries=manifest.parameters,
        round=task.round,
        attempt=task.attempt,
        bits=bits,
    )


def update_type(manifest: Manifest) -> np.dtype[Any]:
    """Return how a site keeps an update of this job."""
    return np.dtype("<f4" if manifest.shared_noise is None else "<i4")


def new(digests: Mapping[str, bytes], site: str, body: bytes) -> bool:
    """Tell whether this is new; the same again is no fault: its answer may have been lost.

    Raises:
        UpdateRefused: the site has sent something else before.
    """
    if site in digests and digests[site] != hashlib.sha256(body).digest():
        raise UpdateRefused(site, "it has sent something else before")
    return site not in digests


def encode(
    update: Vector, residual: Vector | None, manifest: Manifest, task: Task
) -> tuple[bytes, Vector | None]:
    """Return an update in the clear as bytes, and what quantisation left for the next one."""
    expected = header(manifest, task)
    if expected.encoding is Encoding.FLOAT32:
        return encode_floats(update, expected), None
    blocks, left = quantisation.quantise(update, residual, bits=expected.bits)
    return encode_blocks(blocks, expected), left
