"""The certificate of a federated model: the coordinator's statement, and each site's own part.

Its subject is the adapter. The predicate holds the whole manifest, the chain of rounds, what every
site states that it has spent, and who is protected from whom. The file carries the sites' parts
with their signatures and their logs' proofs, so that what a site has spent, in which rounds and
beside whom, does not rest on the coordinator's word. What does is said in `federated_scope`: which
authority the sites' certificates come from, and what became of each round's sum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import rfc8785

from llmos.crypto import dsse
from llmos.crypto.notes import NoteKey
from llmos.errors import ModelError
from llmos.federations.manifest import Manifest, SignedManifest
from llmos.reports import evidence, federated_rounds, federated_scope
from llmos.reports.certificate import STATEMENT_TYPE
from llmos.reports.site_part import SitePart
from llmos.transparency.proofs import LogProof

PREDICATE_TYPE: Final = "https://llmos.dev/federated-certificate/v2"
MEDIA_TYPE: Final = "application/vnd.llmos.federated-certificate.v2+json"
MEDIA_TYPE_1: Final = "application/vnd.llmos.federated-certificate.v1+json"
# A manifest has at most 10,000 rounds and 1,000 sites. A round takes 300 bytes, and 250 for a bit
# of each site; the envelope's base64 makes 7.4 MB of all. A site's part takes 12 kB, its bits 3.7
# kB more, what the predicate says of it 0.5 kB: 16 MB of all. So 24 MB, and more than as much again
# for longer names, and for larger logs: a proof grows by 47 bytes as a log doubles.
LARGEST_BYTES: Final = 1 << 26
_LARGEST_PROOF_BYTES: Final = 1 << 16  # of the certificate's own log entry


@dataclass(frozen=True, slots=True)
class FederatedFacts:
    """Everything that the certificate of a federated model says."""

    issued_at: str  # RFC 3339, UTC
    issued_by: str
    model: str
    digest: str  # SHA-256 of the adapter's files, hex
    signed: SignedManifest
    rounds: Sequence[Mapping[str, Any]]  # as the register has them
    authority: str  # the CA's certificate and revocation list, PEM
    parts: Mapping[str, SitePart]  # by SPIFFE ID
    evidence: Mapping[str, LogProof]  # propose, publish


def statement(facts: FederatedFacts, issuer: str) -> dict[str, Any]:
    """Build the in-toto statement whose subject is the model."""
    manifest = facts.signed.manifest
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": facts.model, "digest": {"sha256": facts.digest}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "issued_at": facts.issued_at,
            "issuer": issuer,
            "issued_by": facts.issued_by,
            "manifest": manifest.model_dump(mode="json"),
            "manifest_sha256": manifest.digest,
            "rounds": federated_rounds.chain(facts.rounds, manifest),
            "authority": facts.authority,
            "sites": {uri: site_facts(part) for uri, part in facts.parts.items()},
            "guarantee": guarantee(facts.parts, manifest),
            "protected": federated_scope.protected(manifest),
            "not_protected": list(federated_scope.not_protected(manifest)),
            "records": evidence.pointers(facts.evidence),
        },
    }


def site_facts(part: SitePart) -> dict[str, Any]:
    """Return what the predicate says about a site; its part proves it."""
    said, spent = part.statement, part.statement.spent
    return {
        "statement_sha256": hashlib.sha256(said.payload).hexdigest(),
        "ended": said.ended,
        "units": said.data.units,
        "unit": said.data.unit,
        "epsilon": 0.0 if spent is None else spent.epsilon,
        "delta": 0.0 if spent is None else spent.delta,
        "steps": 0 if spent is None else spent.steps,
    }


def guarantee(parts: Mapping[str, SitePart], manifest: Manifest) -> dict[str, Any]:
    """Return the worst guarantee among the sites' units: that of a person known to one site.

    For a person whom several know, basic composition adds both epsilon and delta, also of trainings
    that go on beside each other (Vadhan and Zhang 2023, arXiv:2207.08335). Where the sites share
    one noise it does not hold: such a person moves one sum several times.
    """
    spent = [part.statement.spent for part in parts.values() if part.statement.spent is not None]
    shared = manifest.shared_noise is not None
    return {
        "definition": "(epsilon, delta)-differential privacy of each unit of a site",
        "neighboring": "add-or-remove-one",
        "epsilon": max(one.epsilon for one in spent),
        "delta": max(one.delta for one in spent),
        "several_sites": federated_scope.SEVERAL_SHARED if shared else federated_scope.SEVERAL,
        "epsilon_of_all_sites": None if shared else sum(one.epsilon for one in spent),
        "delta_of_all_sites": None if shared else sum(one.delta for one in spent),
    }


def seal(facts: FederatedFacts, key: NoteKey) -> dict[str, Any]:
    """Sign the statement and return its DSSE envelope."""
    return dsse.sign(rfc8785.dumps(statement(facts, key.name)), dsse.IN_TOTO, key)


def contents(
    envelope: Mapping[str, Any], facts: FederatedFacts, parts: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what a certificate's file has beside the proof that it is in its own log.

    Args:
        envelope: what `seal` returned.
        facts: what it says.
        parts: the sites' parts as they sent them.

    Raises:
        ModelError: no file may be so large.
    """
    fields: dict[str, Any] = {
        "mediaType": MEDIA_TYPE,
        "envelope": dict(envelope),
        "manifest": facts.signed.envelope,
        "records": {name: record.to_dict() for name, record in facts.evidence.items()},
        "sites": {uri: dict(part) for uri, part in parts.items()},
    }
    size = len(rfc8785.dumps(fields))
    if size > LARGEST_BYTES - _LARGEST_PROOF_BYTES:
        raise ModelError(
            f"the certificate of {facts.model} would have {size:,} bytes, and at most "
            f"{LARGEST_BYTES - _LARGEST_PROOF_BYTES:,} are read",
            hint="train by jobs of fewer rounds or sites",
        )
    return fields


def bundle(fields: Mapping[str, Any], proof: LogProof) -> bytes:
    """Return the certificate file: `contents` and the proof of its log entry, canonical JSON."""
    return rfc8785.dumps({**fields, "log_proof": proof.to_dict()})
