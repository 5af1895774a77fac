"""The manifest of a federated training: all that is run, signed by the coordinator; never code.

A site runs what it has itself installed, with these numbers, or nothing. The manifest is JSON in an
envelope (DSSE); its SHA-256 is what sites answer for and what both sides record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Final, Literal

import rfc8785
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmos.crypto import dsse
from llmos.crypto.notes import NoteKey, Verifier, decode_base64
from llmos.errors import RequestError, VerificationFailed

MANIFEST_TYPE: Final = "application/vnd.llmos.federated-job+json"
ANSWER_TYPE: Final = "application/vnd.llmos.federated-answer+json"
FEWEST_MASKED: Final = 3  # of two sites each would learn the other's update from the sum
_MOST_SITES: Final = 1000
_MOST_SUM_BITS: Final = 32  # of an entry of a masked sum: the engine's words
_LONGEST_PURPOSE: Final = 200

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
AuthorityUri = Annotated[str, Field(pattern=r"^spiffe://[a-z0-9.-]{1,63}/authority$")]
Timestamp = Annotated[
    str,
    Field(
        pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}"
        r"(\.[0-9]{1,6})?(Z|[+-][0-9]{2}:[0-9]{2})$"
    ),
]
PartyUri = Annotated[str, Field(pattern=r"^spiffe://[a-z0-9.-]{1,63}/party/[a-z0-9-]{1,63}$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class Value(BaseModel):
    """A part of a manifest; what it does not know it refuses."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ServerOptimizer(StrEnum):
    """How the coordinator turns the mean update into new weights."""

    AVERAGE = "average"
    MOMENTUM = "momentum"
    ADAM = "adam"


class Adapter(Value):
    """Which weights are trained; every site derives the frozen ones from `seed` or the base.

    Plain LoRA is none of them: the mean of the products BA is not the product of the means.
    """

    parametrisation: Literal["ffa-lora", "fed-sb"]
    rank: int = Field(ge=1, le=1024)
    last_layers: int | None = Field(None, ge=1)
    targets: Literal["all", "attention"] = "all"  # which linear layers of a block
    seed: int = Field(ge=0, lt=2**53)


class Local(Value):
    """What each site does in one round."""

    steps: int = Field(ge=1, le=10_000)
    batch: int = Field(ge=1)  # units a step, expected
    learning_rate: float = Field(gt=0)
    max_tokens: int = Field(ge=8)
    max_records_per_unit: int = Field(ge=1)
    proximal: float = Field(0.0, ge=0)  # FedProx's mu


class Server(Value):
    """What the coordinator does with the mean of the updates."""

    optimizer: ServerOptimizer = ServerOptimizer.AVERAGE
    learning_rate: float = Field(1.0, gt=0)


class SharedNoise(Value):
    """Discrete noise of which each site adds a share: only sums have all of it."""

    multiplier: float = Field(gt=0)  # of the sum of `honest` sites, as each ledger is charged
    honest: int = Field(ge=2)  # sites in every sum that do not work with the coordinator


class Privacy(Value):
    """The guarantee that each site gives each of its own units, over the whole job."""

    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    clip: float = Field(gt=0)
    shared: SharedNoise | None = None  # None: each site adds all the noise that its epsilon takes


class Masked(Value):
    """Secure aggregation: the coordinator sees sums only."""

    kind: Literal["masked"] = "masked"
    threshold: int = Field(ge=FEWEST_MASKED)
    bits: int = Field(16, ge=4, le=24)


class Plain(Value):
    """Each site's update is seen by the coordinator."""

    kind: Literal["plain"] = "plain"
    bits: Literal[4, 8, 32] = 4


class Manifest(Value):
    """A job as its coordinator signs it."""

    type: Literal["llmos.federated-job/v1"] = "llmos.federated-job/v1"
    id: str = Field(pattern=r"^fed-[0-9a-f]{16}$")
    created_at: Timestamp
    coordinator: AuthorityUri
    model: Name
    model_digest: Hash
    dataset: Name
    purpose: str
    output: Name
    adapter: Adapter
    layout: Hash  # of the vector of trained weights: names, sizes, order
    parameters: int = Field(ge=1, lt=2**32)
    local: Local
    server: Server
    privacy: Privacy | None
    rounds: int = Field(ge=1, le=10_000)
    spare_rounds: int = Field(ge=0, le=1000)  # that a site may have to repeat after a crash
    sites: tuple[PartyUri, ...] = Field(min_length=2, max_length=_MOST_SITES)
    minimum_sites: int = Field(ge=2)
    aggregation: Masked | Plain = Field(discriminator="kind")
    deadline_s: float = Field(gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if len(set(self.sites)) != len(self.sites) or list(self.sites) != sorted(self.sites):
            raise ValueError("sites must be sorted and named once")
        if self.minimum_sites > len(self.sites):
            raise ValueError(f"minimum_sites is more than the {len(self.sites)} sites")
        if isinstance(self.aggregation, Masked):
            threshold = self.aggregation.threshold
            if not len(self.sites) < 2 * threshold <= 2 * len(self.sites):
                raise ValueError("threshold must be more than half of the sites, and not above")
            if self.minimum_sites < threshold:
                raise ValueError("minimum_sites must not be below the threshold")
        if self.shared_noise is not None:
            if not isinstance(self.aggregation, Masked):
                raise ValueError("shared noise takes secure aggregation: one site has too little")
            if self.shared_noise.honest >= self.aggregation.threshold:
                raise ValueError("honest must be below the threshold: sites may collude")
            if self.local.steps != 1 or self.local.proximal != 0:
                raise ValueError("shared noise is added to one step's sum: steps 1, proximal 0")
        return self

    @property
    def shared_noise(self) -> SharedNoise | None:
        """Return the noise that the sites share; None where each adds its own, or none."""
        return None if self.privacy is None else self.privacy.shared

    @property
    def most_steps(self) -> int:
        """Return the steps that a site charges for: all rounds and the spare ones."""
        return self.local.steps * (self.rounds + self.spare_rounds)

    @property
    def payload(self) -> bytes:
        """Return the bytes that are signed."""
        return rfc8785.dumps(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the payload, in hex."""
        return hashlib.sha256(self.payload).hexdigest()


@dataclass(frozen=True, slots=True)
class SignedManifest:
    """A manifest with the envelope that proves who made it."""

    manifest: Manifest
    envelope: dict[str, Any]


def sign(manifest: Manifest, key: NoteKey) -> SignedManifest:
    """Sign a manifest by the coordinator's certificate key."""
    return SignedManifest(manifest, dsse.sign(manifest.payload, MANIFEST_TYPE, key))


def open_manifest(envelope: Mapping[str, Any], verifier: Verifier) -> SignedManifest:
    """Return the manifest of an envelope that the coordinator signed.

    Raises:
        VerificationFailed: the signature is not the coordinator's.
        RequestError: what was signed is no manifest of this version.
    """
    payload = dsse.open_envelope(envelope, verifier, payload_type=MANIFEST_TYPE)
    manifest = parse(json.loads(payload))
    if manifest.payload != payload:
        raise VerificationFailed("the manifest is not in its canonical form")
    return SignedManifest(manifest, dict(envelope))


def stored(envelope: dict[str, Any]) -> SignedManifest:
    """Read an envelope that was checked when it was stored, by the rules of that time."""
    return SignedManifest(_read(json.loads(decode_base64(envelope["payload"]))), envelope)


def parse(fields: object) -> Manifest:
    """Read a manifest and check it.

    Raises:
        RequestError: a field is missing, unknown or out of range; the first one is named.
    """
    manifest = _read(fields)
    check(manifest)
    return manifest


def check(manifest: Manifest) -> None:
    """Refuse what must not run, although homes may have kept such manifests of earlier versions.

    Raises:
        RequestError: the purpose is no short printable line, or the numbers allow for sums that
            overflow, or for more colluding sites than secure aggregation withstands.
    """
    purpose = manifest.purpose
    if not (0 < len(purpose) <= _LONGEST_PURPOSE and purpose.isprintable()):
        raise RequestError(f"purpose: it is not one line of up to {_LONGEST_PURPOSE} characters")
    if not isinstance(masked := manifest.aggregation, Masked):
        return
    sites = len(manifest.sites)
    if manifest.shared_noise is None:
        if masked.bits + (sites - 1).bit_length() > _MOST_SUM_BITS:
            raise RequestError(
                f"aggregation.bits: a sum of {sites} sites of {masked.bits} bits each does not fit "
                f"{_MOST_SUM_BITS} bits"
            )
        return
    # Bonawitz et al. 2017, Theorem 6.5, and two more in every sum: `colluders` of the engine
    withstood = min(2 * masked.threshold - sites - 1, masked.threshold - 2)
    if (colluding := masked.threshold - manifest.shared_noise.honest) > withstood:
        raise RequestError(
            f"privacy.shared.honest: secure aggregation of {sites} sites with threshold "
            f"{masked.threshold} withstands {withstood} colluding sites, not {colluding}"
        )


def _read(fields: object) -> Manifest:
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise RequestError(f"{place}: {first['msg'].removeprefix('Value error, ')}") from error


def describe(manifest: Manifest) -> str:
    """Say what a job wants, in one line."""
    privacy = manifest.privacy
    cost = "WITHOUT privacy" if privacy is None else f"epsilon {privacy.epsilon:g} at most"
    how = "masked sums" if isinstance(manifest.aggregation, Masked) else "updates in the clear"
    if manifest.shared_noise is not None:
        how += f" with noise that {manifest.shared_noise.honest} honest sites share"
    return (
        f"{manifest.adapter.parametrisation} of {manifest.model} on {manifest.dataset} for "
        f"{manifest.purpose}, {manifest.rounds} rounds, {len(manifest.sites)} sites, {cost}, {how}"
    )
