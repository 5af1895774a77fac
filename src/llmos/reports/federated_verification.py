"""Offline verification of a federated model's certificate: the file and the coordinator's keys.

A site's keys are believed because a certificate of the authority that the coordinator names
signs them; for whoever has a site's own `home.pub`, the coordinator is not believed in that.

The model is the one that a site has published; a site that left before the end never saw it. What
the coordinator made of each round's sum stays its word (`federated_scope.NOT_PROTECTED`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from llmos.crypto import dsse
from llmos.crypto.notes import Verifier, decode_base64
from llmos.errors import LlmosError, VerificationFailed
from llmos.federations.manifest import Manifest, open_manifest, parse
from llmos.federations.statement import Spent, numbers
from llmos.kernel import pricing
from llmos.parties.peers import Anchor, parse_id
from llmos.reports import (
    evidence,
    federated_certificate,
    federated_rounds,
    federated_scope,
    site_part,
)
from llmos.reports.bundle import read_json, read_proof
from llmos.reports.certificate import DIGEST_FIELD, STATEMENT_TYPE
from llmos.reports.evidence import found_at
from llmos.reports.federated_certificate import (
    LARGEST_BYTES,
    MEDIA_TYPE,
    MEDIA_TYPE_1,
    PREDICATE_TYPE,
)
from llmos.reports.federated_rounds import Round
from llmos.reports.site_part import SitePart
from llmos.transparency.proofs import LogProof, verify_proof
from llmos.transparency.public_keys import read_public_keys

_FIELDS: Final = {"mediaType", "envelope", "manifest", "records", "sites"}  # and the log's proof
_PREDICATE: Final = {
    "issued_at", "issuer", "issued_by", "manifest", "manifest_sha256", "rounds", "authority",
    "sites", "guarantee", "protected", "not_protected", "records",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class VerifiedFederation:
    """A federated certificate after every check; before it is logged nothing is said of its log."""

    model: str
    digest: str
    predicate: Mapping[str, Any]
    rounds: Sequence[Round]
    parts: Mapping[str, SitePart]
    compared: frozenset[str]  # names of the sites whose own keys were at hand
    model_checked: bool = False
    log: str = ""
    log_index: int = 0
    log_size: int = 0

    def summary(self) -> dict[str, Any]:
        """Return what a person or a program wants to see first."""
        guarantee = self.predicate["guarantee"]
        return {
            "model": self.model,
            "sha256": self.digest,
            "model_files": "match" if self.model_checked else "not compared",
            "epsilon": guarantee["epsilon"],
            "delta": guarantee["delta"],
            "guarantee": f"{guarantee['definition']}, {guarantee['neighboring']}",
            "several sites": self._several_sites,
            "rounds": len(self.predicate["rounds"]),
            "site": [self._line(part) for part in self.parts.values()],
            "protected": [
                f"{one['what']}, from {one['from']}: {one['by']}"
                for one in self.predicate["protected"]
            ],
            "not protected": list(self.predicate["not_protected"]),
            "issuer": self.predicate["issuer"],
            "issued_at": self.predicate["issued_at"],
            "log": self.log,
            "log_index": self.log_index,
            "log_size": self.log_size,
        }

    @property
    def _several_sites(self) -> str:
        said = self.predicate["guarantee"]
        text, epsilon = str(said["several_sites"]), said["epsilon_of_all_sites"]
        if epsilon is None:
            return text
        return f"{text}; of all: epsilon {epsilon:.4g} at delta {said['delta_of_all_sites']:.4g}"

    def _line(self, part: SitePart) -> str:
        said, spent = part.statement, part.statement.spent
        keys = (
            "its own keys were compared"
            if part.site in self.compared
            else "its keys rest on the coordinator's certificate authority"
        )
        cost = (
            "nothing spent"
            if spent is None
            else f"epsilon {spent.epsilon:.4g} for each of {said.data.units} units "
            f"({said.data.unit}), {spent.steps} steps, charged {_nats(said.data.name, spent)}"
        )
        model = "never saw the model" if said.model_sha256 is None else "published this very model"
        trained = f"trained in {len(numbers(said.rounds.trained))} of {len(self.rounds)} rounds"
        return (
            f"{part.site}: {cost}, {said.ended}; {trained}; {model}; {part.records} entries of its "
            f"log proven; {keys}"
        )


def _nats(pool: str, spent: Spent) -> str:
    nats = int(spent.charged[pool]) / pricing.UNITS_PER_NAT
    return f"{nats:.4g} nats of Renyi divergence at order {spent.orders[pool]}"


def verify_file(
    data: bytes,
    public_keys: str,
    *,
    site_keys: Mapping[str, str] | None = None,
    model_digest: str | None = None,
) -> VerifiedFederation:
    """Check a federated certificate: signatures, the chain of rounds, every site's part and proofs.

    Args:
        data: the file; only the one canonical spelling of its JSON is accepted.
        public_keys: the two lines of the coordinator's `home.pub`.
        site_keys: the `home.pub` of sites, by the site's name, from the sites themselves.
        model_digest: SHA-256 of the adapter's files at hand, hex, to compare.

    Raises:
        VerificationFailed: a check failed; the message says which.
    """
    _, log_key = read_public_keys(public_keys)
    fields = read_json(data, "the certificate", LARGEST_BYTES)
    proof = read_proof(fields.pop("log_proof", None))
    found = examine(fields, public_keys, site_keys=site_keys)
    payload = decode_base64(fields["envelope"]["payload"])
    _check_entry(verify_proof(proof, log_key), payload, found)
    if model_digest is not None and model_digest != found.digest:
        raise VerificationFailed(
            f"the model at hand has SHA-256 {model_digest}, the certified one {found.digest}",
            hint="the certificate belongs to another model, or the model's files were changed",
        )
    return replace(
        found,
        model_checked=model_digest is not None,
        log=log_key.name,
        log_index=proof.index,
        log_size=proof.size,
    )


def examine(
    fields: Mapping[str, Any], public_keys: str, *, site_keys: Mapping[str, str] | None = None
) -> VerifiedFederation:
    """Check all of a certificate's file but that it is in its own log.

    Raises:
        VerificationFailed: a check failed; the message says which.
    """
    certificate_key, log_key = read_public_keys(public_keys)
    if fields.get("mediaType") == MEDIA_TYPE_1:
        raise VerificationFailed(
            "this certificate is of version 1: its sites did not state their rounds",
            hint="ask for a new one: sites state again, then `llmos report` at the coordinator",
        )
    if fields.get("mediaType") != MEDIA_TYPE or set(fields) != _FIELDS:
        raise VerificationFailed("this is not a federated certificate, or it has other fields")
    payload = dsse.open_envelope(fields["envelope"], certificate_key, payload_type=dsse.IN_TOTO)
    try:
        statement = read_json(payload, "the signed statement", LARGEST_BYTES)
        predicate = statement["predicate"]
        model, digest = _subject(statement, predicate, certificate_key.name)
        manifest = open_manifest(fields["manifest"], certificate_key).manifest
        _check_manifest(predicate, manifest)
        records = {name: read_proof(record) for name, record in fields["records"].items()}
        rounds = federated_rounds.opened(predicate["rounds"], manifest)
        federated_rounds.check_chain(rounds, manifest)
        _check_records(predicate, manifest, rounds, digest, records, log_key)
        parts = _verify_parts(predicate, manifest, rounds, digest, fields["sites"])
        compared = _compare_keys(parts, site_keys or {})
    except VerificationFailed:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, LlmosError) as error:
        raise VerificationFailed(f"the certificate lacks or misuses a field: {error}") from error
    return VerifiedFederation(model, digest, predicate, rounds, parts, compared)


def _subject(
    statement: Mapping[str, Any], predicate: Mapping[str, Any], issuer: str
) -> tuple[str, str]:
    if (statement["_type"], statement["predicateType"]) != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise VerificationFailed("the signed statement is not a federated certificate")
    if set(predicate) != _PREDICATE:
        raise VerificationFailed("the signed statement has other sections than ours")
    if predicate["issuer"] != issuer:
        raise VerificationFailed(f"the certificate names another issuer: {predicate['issuer']!r}")
    (subject,) = statement["subject"]
    return str(subject["name"]), str(subject["digest"]["sha256"])


def _check_entry(entry: Mapping[str, Any], payload: bytes, found: VerifiedFederation) -> None:
    expected = {
        "/action": "report",
        "/outcome": "done",
        "/actor": found.predicate["issued_by"],
        "/resource": f"Model::{found.model}",
        f"/details/{DIGEST_FIELD}": hashlib.sha256(payload).hexdigest(),
    }
    if any(found_at(entry, place) != value for place, value in expected.items()):
        raise VerificationFailed("the log entry is of something else than this certificate")


def _check_manifest(predicate: Mapping[str, Any], manifest: Manifest) -> None:
    if parse(predicate["manifest"]) != manifest or predicate["manifest_sha256"] != manifest.digest:
        raise VerificationFailed("the certificate is about another job than its signed manifest")
    if predicate["protected"] != federated_scope.protected(manifest):
        raise VerificationFailed("what it says is protected does not follow from the manifest")
    if predicate["not_protected"] != list(federated_scope.not_protected(manifest)):
        raise VerificationFailed("it conceals what is not protected")


def _check_records(
    predicate: Mapping[str, Any],
    manifest: Manifest,
    rounds: Sequence[Round],
    digest: str,
    proofs: Mapping[str, LogProof],
    log_key: Verifier,
) -> None:
    """Hold the predicate against the coordinator's own log."""
    if predicate["records"] != evidence.pointers(proofs):
        raise VerificationFailed("the certificate points to other log entries than it carries")
    expected: dict[str, dict[str, object]] = {
        "propose": {
            "/details/propose": manifest.id,
            "/details/manifest_sha256": manifest.digest,
        },
        "publish": {
            "/details/job": manifest.id,
            "/details/digest": digest,
            "/details/weights": rounds[-1]["weights_after"],
            "/details/rounds_sha256": federated_rounds.rounds_sha256(rounds),
        },
    }
    if set(proofs) != set(expected):
        raise VerificationFailed(f"it proves the records {sorted(proofs)}, not those of a job")
    for name, proof in proofs.items():
        entry = verify_proof(proof, log_key)
        common = {"/action": "coordinate", "/outcome": "done"}
        for place, value in (common | expected[name]).items():
            if found_at(entry, place) != value:
                raise VerificationFailed(f"the record {name!r} says otherwise: {place}")


def _verify_parts(
    predicate: Mapping[str, Any],
    manifest: Manifest,
    rounds: Sequence[Round],
    digest: str,
    given: Mapping[str, Mapping[str, Any]],
) -> dict[str, SitePart]:
    organisation = parse_id(manifest.coordinator).organisation
    anchors = (Anchor.parse(organisation, predicate["authority"].encode()),)
    if not set(given) <= set(manifest.sites):
        raise VerificationFailed("it has the part of a site that the job does not name")
    parts = {
        uri: site_part.verify(part, uri, anchors, manifest) for uri, part in sorted(given.items())
    }
    _check_distinct(parts)
    federated_rounds.check_sites(rounds, parts, manifest)
    _check_model(parts, digest)
    if predicate["sites"] != {
        uri: federated_certificate.site_facts(part) for uri, part in parts.items()
    }:
        raise VerificationFailed("it says otherwise about its sites than they do themselves")
    if predicate["guarantee"] != federated_certificate.guarantee(parts, manifest):
        raise VerificationFailed("its guarantee does not follow from its sites' parts")
    return parts


def _check_distinct(parts: Mapping[str, SitePart]) -> None:
    """Insist on a home of its own for each site: one that plays three would outvote the others."""
    owners: dict[bytes, str] = {}
    for part in parts.values():
        for key in part.keys:
            if (other := owners.setdefault(key, part.site)) != part.site:
                raise VerificationFailed(f"{other} and {part.site} have signed with the same key")


def _check_model(parts: Mapping[str, SitePart], digest: str) -> None:
    """Insist on a site that has seen the model: the others cannot tell it from any other one."""
    published = {part.statement.model_sha256: part.site for part in parts.values()}
    published.pop(None, None)
    if not published:
        raise VerificationFailed(
            "no site has published the model: the coordinator could certify any other one",
            hint="a job is certified whose end the sites have heard of",
        )
    for other in set(published) - {digest}:
        raise VerificationFailed(f"{published[other]} has published another model")


def _compare_keys(parts: Mapping[str, SitePart], site_keys: Mapping[str, str]) -> frozenset[str]:
    by_name = {part.site: part.statement for part in parts.values()}
    for name, text in site_keys.items():
        if name not in by_name:
            raise VerificationFailed(f"the certificate has no site {name!r}")
        if text.splitlines() != [by_name[name].vkey, by_name[name].log_vkey]:
            raise VerificationFailed(
                f"{name} has signed with other keys than the ones at hand",
                hint="the coordinator may have invented this site: ask it for its home.pub",
            )
    return frozenset(site_keys)
