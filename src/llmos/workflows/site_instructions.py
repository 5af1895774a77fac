"""What a coordinator tells a site, read with the care that another organisation's word takes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from llmos.crypto import dsse
from llmos.crypto.certificates import PartyId
from llmos.crypto.notes import Verifier
from llmos.errors import RequestError
from llmos.federations.manifest import Manifest, SignedManifest, open_manifest
from llmos.workflows.federated_round import ROUND_TYPE, Task

_HASH: Final = re.compile(r"[0-9a-f]{64}")


def require_coordinator(manifest: Manifest, organisation: str) -> None:
    """Insist that a job names as its coordinator the one of the organisation that asks for it.

    Policy decides, and the log blames, by the name in the manifest. A signature alone says only
    that the organisation signed it, whatever name it wrote there.

    Raises:
        RequestError: it names another one.
    """
    expected = PartyId(organisation, None).uri
    if manifest.coordinator != expected:
        raise RequestError(
            f"{manifest.id} names {manifest.coordinator} as its coordinator, and {expected} asks"
        )


def read_manifest(
    envelope: Mapping[str, Any], verifier: Verifier, site: PartyId, job_id: str
) -> SignedManifest:
    """Return a job that is proposed to a site.

    Raises:
        VerificationFailed: the signature is not the coordinator's.
        RequestError: it is no manifest of this job, names another organisation's coordinator, or
            does not name this site.
    """
    signed = open_manifest(envelope, verifier)
    if signed.manifest.id != job_id:
        raise RequestError(f"the manifest is of {signed.manifest.id}")
    require_coordinator(signed.manifest, site.organisation)
    if site.uri not in signed.manifest.sites:
        raise RequestError(f"{job_id} does not name this site")
    return signed


def read_task(envelope: Mapping[str, Any], verifier: Verifier, job_id: str) -> Task:
    """Return the signed task of an attempt at a round.

    Raises:
        VerificationFailed: the signature is not the coordinator's.
        RequestError: what was signed is no task of this job.
    """
    payload = dsse.open_envelope(envelope, verifier, payload_type=ROUND_TYPE)
    try:
        task = Task(**json.loads(payload))
    except (ValueError, TypeError) as error:
        raise RequestError("what was signed is no task of a round") from error
    if task.job != job_id or not _is_well_formed(task):
        raise RequestError(f"what was signed is no task of a round of {job_id}")
    return task


def _is_well_formed(task: Task) -> bool:
    hashes = (task.manifest_sha256, task.weights_sha256)
    return (
        all(isinstance(one, str) and _HASH.fullmatch(one) for one in hashes)
        and _are_counts(task.round, task.attempt)
        and isinstance(task.participants, dict)
        and _are_counts(*task.participants.values())
    )


def _are_counts(*values: object) -> bool:
    return all(type(value) is int and value >= 0 for value in values)
