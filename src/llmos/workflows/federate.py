"""Propose a federated training: sign its manifest and keep it for the coordinator to run."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmos.crypto.certificates import PartyId
from llmos.engines.federated.session import colluders, default_threshold
from llmos.errors import ConfigError, ModelError
from llmos.federations import manifest as manifests
from llmos.federations import register
from llmos.federations.manifest import (
    FEWEST_MASKED,
    Adapter,
    Local,
    Manifest,
    Masked,
    Plain,
    Privacy,
    Server,
    ServerOptimizer,
    SharedNoise,
    SignedManifest,
)
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.kernel.store import now
from llmos.models.devices import resolve_device
from llmos.models.loading import load_base
from llmos.parties import authority
from llmos.privacy import check_delta, check_epsilon
from llmos.workflows import federated_adapter
from llmos.workflows.calibration import calibrate_noise
from llmos.workflows.parts import Parts

_SEED_BITS: Final = 53
_T = TypeVar("_T")
_SERVER_RATES: Final = {
    ServerOptimizer.AVERAGE: 1.0,
    ServerOptimizer.MOMENTUM: 0.5,  # of momentum 0.9: ten steps' worth of it would overshoot
    ServerOptimizer.ADAM: 1e-2,
}


class FederateRequest(BaseModel):
    """A job file; what is left out gets a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str
    data: str
    sites: tuple[str, ...] = Field(min_length=2)
    output: str | None = None
    purpose: str = "training"
    method: Literal["ffa-lora", "fed-sb"] = "ffa-lora"
    rank: int = 16
    last_layers: int | None = None
    targets: Literal["all", "attention"] = "all"
    rounds: int = 10
    spare_rounds: int = 2
    local_steps: int | None = Field(None, ge=1)  # 4; 1 under shared noise
    batch: int = 16
    learning_rate: float = 2e-3
    max_tokens: int = 256
    max_records_per_unit: int = 4
    proximal: float = 0.0
    server: ServerOptimizer | None = None  # average; adam under shared noise
    server_learning_rate: float | None = Field(None, gt=0)  # the optimiser's own default
    privacy: bool = True
    epsilon: float | None = None
    delta: float = 1e-5
    clip: float = 1.0
    shared_noise: bool = False
    smallest_site: int | None = Field(None, ge=1)  # units; the noise that sites share is for it
    colluding_sites: int = 1
    secure_aggregation: bool = True
    bits: int | None = Field(None, ge=1)
    minimum_sites: int | None = Field(None, ge=1)
    deadline_s: float = 600.0
    validation: str | None = None


def read(file: Path) -> FederateRequest:
    """Read a job file in YAML.

    Raises:
        ConfigError: it cannot be read, or a field is missing, unknown or out of range.
    """
    try:
        fields = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read as YAML: {_first_line(error)}") from error
    return check(fields if isinstance(fields, dict) else {})


def check(fields: dict[str, Any]) -> FederateRequest:
    """Check the fields of a job.

    Raises:
        ConfigError: a field is missing, unknown or out of range.
    """
    try:
        request = FederateRequest.model_validate(fields)
    except ValidationError as error:
        raise _out_of_range(error) from error
    if request.privacy != (request.epsilon is not None):
        raise ConfigError(
            "a job names its epsilon, or says `privacy: false`",
            hint="without privacy the model may repeat training data word for word",
        )
    if request.epsilon is not None:
        check_epsilon(request.epsilon)
        check_delta(request.delta)
    if request.shared_noise != (request.smallest_site is not None):
        raise ConfigError(
            "`shared_noise: true` and `smallest_site: UNITS` go together",
            hint="all sites add shares of one noise, which is calibrated for the smallest of them",
        )
    if request.shared_noise and not (request.privacy and request.secure_aggregation):
        raise ConfigError("shared noise takes privacy and secure aggregation: only sums have it")
    if request.shared_noise and request.bits is not None:
        raise ConfigError("bits: sums with shared noise always have 32")
    return request


def run(request: FederateRequest, who: Principal, parts: Parts) -> SignedManifest:
    """Sign the manifest of a job and store it; the running coordinator offers it to the sites.

    Raises:
        ConfigError: a number is out of range, or those of sites do not fit together.
        UnknownParty: this home is no CA, or a site has not joined.
        UnknownModel, ModelError: the model is no base model of this home.
        PermissionDenied: policy does not let `who` coordinate.
    """
    kernel = parts.kernel
    kernel.monitor.authorize(who, Action.COORDINATE, kernel.home)
    if request.validation is not None:
        parts.datasets.card(request.validation)
    try:
        manifest = make_manifest(request, parts)
    except ValidationError as error:
        raise _out_of_range(error) from error
    signed = manifests.sign(manifest, kernel.certificate_key)
    details = {"propose": manifest.id, "manifest_sha256": manifest.digest, "sites": request.sites}
    with kernel.monitor.act(who, Action.COORDINATE, kernel.home, details=details) as conn:
        register.propose(conn, signed, who.name, request.validation)
    return signed


def make_manifest(request: FederateRequest, parts: Parts) -> Manifest:
    """Derive a manifest: the base model is loaded to say what the trained vector is."""
    ca = authority.load(parts.kernel)
    active = {party.party for party in ca.active()}
    if absent := sorted(set(request.sites) - active):
        raise authority.unknown(absent[0])
    base = parts.registry.model(request.model)
    if base.kind != "base":
        raise ModelError(f"{request.model} is an adapter", hint=f"use {base.base}")
    asked = Adapter(
        parametrisation=request.method,
        rank=request.rank,
        last_layers=request.last_layers,
        targets=request.targets,
        seed=secrets.randbits(_SEED_BITS),
    )
    loaded = load_base(parts.registry.folder(base), resolve_device(parts.kernel.config.device))
    adapter = federated_adapter.attach(asked, loaded)
    sites = sorted(PartyId(ca.organisation, site).uri for site in set(request.sites))
    aggregation = _aggregation(request, len(sites))
    fewest = aggregation.threshold if isinstance(aggregation, Masked) else 2
    steps = _given(request.local_steps, 1 if request.shared_noise else 4)
    optimizer = request.server or (
        ServerOptimizer.ADAM if request.shared_noise else ServerOptimizer.AVERAGE
    )
    rate = request.learning_rate if request.shared_noise else _SERVER_RATES[optimizer]
    fields: dict[str, Any] = {
        "id": f"fed-{secrets.token_hex(8)}",
        "created_at": now(),
        "coordinator": PartyId(ca.organisation, None).uri,
        "model": base.name,
        "model_digest": base.digest,
        "dataset": request.data,
        "purpose": request.purpose,
        "output": request.output or f"{request.data}-federated",
        "adapter": asked,
        "layout": federated_adapter.layout(adapter, asked, base.digest),
        "parameters": int(adapter.vector().numel()),
        "local": Local(
            steps=steps,
            batch=request.batch,
            learning_rate=request.learning_rate,
            max_tokens=request.max_tokens,
            max_records_per_unit=request.max_records_per_unit,
            proximal=request.proximal,
        ),
        "server": Server(
            optimizer=optimizer,
            learning_rate=_given(request.server_learning_rate, rate),
        ),
        "privacy": None
        if request.epsilon is None
        else Privacy(
            epsilon=request.epsilon,
            delta=request.delta,
            clip=request.clip,
            shared=_shared_noise(request, aggregation, steps, len(sites)),
        ),
        "rounds": request.rounds,
        "spare_rounds": request.spare_rounds,
        "sites": sites,
        "minimum_sites": _given(request.minimum_sites, fewest),
        "aggregation": aggregation,
        "deadline_s": request.deadline_s,
    }
    return manifests.parse(fields)


def _aggregation(request: FederateRequest, sites: int) -> Masked | Plain:
    if not request.secure_aggregation:
        return Plain.model_validate({"bits": _given(request.bits, 4)})
    if sites < FEWEST_MASKED:
        raise ConfigError(
            f"secure aggregation takes {FEWEST_MASKED} sites: of two, each would learn the "
            "other's update from the sum",
            hint="add a site, or say `secure_aggregation: false`",
        )
    fields = {"threshold": default_threshold(sites), "bits": _given(request.bits, 16)}
    return Masked.model_validate(fields)


def _shared_noise(
    request: FederateRequest, aggregation: Masked | Plain, steps: int, sites: int
) -> SharedNoise | None:
    """Return the noise that the smallest site needs, over all rounds and the spare ones.

    Raises:
        ConfigError: with so many colluding sites too few would add their share, or secure
            aggregation would show them a single site's sum.
    """
    smallest, epsilon, colluding = request.smallest_site, request.epsilon, request.colluding_sites
    if smallest is None or epsilon is None or not isinstance(aggregation, Masked):
        return None
    withstood = colluders(aggregation.threshold, sites)
    if not 1 <= colluding <= withstood:
        raise ConfigError(
            f"colluding_sites: of {sites} sites 1 to {withstood} may collude, not {colluding}: "
            "each knows the noise that it has added, and more could see a single site's sum",
            hint="ask more sites, or allow for fewer colluding ones",
        )
    honest = aggregation.threshold - colluding
    rate = min(request.batch, smallest) / smallest
    most_steps = steps * (request.rounds + request.spare_rounds)
    multiplier = calibrate_noise(rate, most_steps, epsilon, request.delta)
    return SharedNoise(multiplier=multiplier, honest=honest)


def _out_of_range(error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return ConfigError(f"{place}: {first['msg']}", hint="see docs/federated.md")


def _given(value: _T | None, default: _T) -> _T:
    return default if value is None else value


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
