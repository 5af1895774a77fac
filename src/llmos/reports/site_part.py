"""A site's part of a federated certificate: its statement, two signatures, and its log's proofs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from llmos.crypto import dsse
from llmos.crypto.notes import NoteKey, Verifier, decode_base64, encode_base64
from llmos.errors import CertificateRefused, LlmosError, VerificationFailed
from llmos.federations import statement as statements
from llmos.federations.manifest import Manifest
from llmos.federations.statement import STATEMENT_TYPE, Spent, Statement
from llmos.kernel import accounting, pricing
from llmos.parties import signatures
from llmos.parties.peers import Anchor
from llmos.privacy import PoissonSampledGaussian, mechanism_from_dict
from llmos.reports.bundle import read_json, read_proof
from llmos.reports.evidence import AMOUNT_TOLERANCE, found_at, pointers
from llmos.transparency.proofs import LogProof, verify_proof

_FIELDS: Final = {"envelope", "certificate", "signature", "records"}
_EPSILON_TOLERANCE: Final = 1e-3  # relative; as of every certificate
# What each entry of the site's log is, beside being about this job.
_ENTRIES: Final[dict[str, dict[str, object]]] = {
    "import": {"/action": "import-data", "/outcome": "done"},
    "admit": {"/action": "federate", "/outcome": "admitted"},
    "settle": {"/action": "federate", "/outcome": "settled"},
    "release": {"/action": "federate", "/outcome": "aborted"},
    "publish": {"/action": "federate", "/outcome": "done", "/details/step": "publish"},
}


@dataclass(frozen=True, slots=True)
class SitePart:
    """A site's part after every check; nothing else in the house builds one."""

    statement: Statement
    records: int  # log entries proven
    log_size: int
    keys: frozenset[bytes]  # public ones that it is signed and its log is proven by

    @property
    def site(self) -> str:
        """Return the site's name."""
        return self.statement.site.rpartition("/")[2]

    @property
    def cost(self) -> str:
        """Return what it has spent, in a few words."""
        spent = self.statement.spent
        if spent is None:
            return "nothing spent"
        return f"epsilon {spent.epsilon:.3g}, {spent.steps} steps"


def seal(
    statement: Statement,
    proofs: Mapping[str, LogProof],
    home_key: NoteKey,
    certificate: str,
    party_key: ec.EllipticCurvePrivateKey,
) -> dict[str, Any]:
    """Return what a site sends: its statement signed by both keys, certificate (PEM), proofs."""
    return {
        "envelope": dsse.sign(statement.payload, STATEMENT_TYPE, home_key),
        "certificate": certificate,
        "signature": encode_base64(signatures.sign(party_key, statement.payload)),
        "records": {name: proof.to_dict() for name, proof in proofs.items()},
    }


def verify(
    part: Mapping[str, Any], site: str, anchors: Iterable[Anchor], manifest: Manifest
) -> SitePart:
    """Check a site's part of a job: both signatures, every proof, and its epsilon derived again.

    Raises:
        VerificationFailed: a check failed; the message names the site and says which.
    """
    try:
        return _verify(part, site, tuple(anchors), manifest)
    except VerificationFailed as error:
        raise VerificationFailed(f"{site.rpartition('/')[2]}: {error.message}") from error
    except CertificateRefused as error:
        raise VerificationFailed(f"{site.rpartition('/')[2]}: {error.message}") from error
    except (KeyError, TypeError, ValueError, AttributeError, LlmosError) as error:
        raise VerificationFailed(
            f"{site.rpartition('/')[2]}: its statement lacks or misuses a field: {error}"
        ) from error


def _verify(
    part: Mapping[str, Any], site: str, anchors: tuple[Anchor, ...], manifest: Manifest
) -> SitePart:
    if set(part) != _FIELDS:
        raise VerificationFailed(f"its part has other fields than ours: {sorted(part)}")
    payload = decode_base64(part["envelope"]["payload"])
    said = statements.parse(read_json(payload, "the statement"))
    if said.payload != payload:
        raise VerificationFailed("its statement is not in its canonical form")
    dsse.open_envelope(part["envelope"], Verifier.parse(said.vkey), payload_type=STATEMENT_TYPE)
    at = datetime.fromisoformat(said.at)
    verified = signatures.verifier({site: part["certificate"]}, anchors, at)
    if not verified(site, payload, decode_base64(part["signature"])):
        raise VerificationFailed("its statement is not signed by the key of its certificate")
    if (said.site, said.job) != (site, manifest.id) or said.manifest_sha256 != manifest.digest:
        raise VerificationFailed("its statement is another site's, or about another job")
    _check_spent(said, manifest)
    proofs = {name: read_proof(proof) for name, proof in part["records"].items()}
    _check_records(said, proofs)
    homes = {Verifier.parse(vkey).public_key for vkey in (said.vkey, said.log_vkey)}
    certificate = x509.load_pem_x509_certificate(part["certificate"].encode())
    party = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return SitePart(said, len(proofs), proofs["admit"].size, frozenset({*homes, party}))


def _check_spent(said: Statement, manifest: Manifest) -> None:
    privacy, spent = manifest.privacy, said.spent
    if privacy is None:
        raise VerificationFailed("the job has no guarantee, there is nothing to state")
    if spent is None:
        return
    mechanism = mechanism_from_dict(spent.mechanism)
    if not isinstance(mechanism, PoissonSampledGaussian) or mechanism.steps != spent.steps:
        raise VerificationFailed("its mechanism has not the steps that it states")
    rate = min(manifest.local.batch, said.data.units) / said.data.units
    if not math.isclose(mechanism.sampling_probability, rate):
        raise VerificationFailed("its mechanism samples otherwise than the job says")
    shared = privacy.shared
    if shared is not None and mechanism.noise_multiplier != shared.multiplier:
        raise VerificationFailed("its mechanism has other noise than the sites share")
    derived = accounting.epsilon(mechanism, privacy.delta)
    if not math.isclose(derived, spent.epsilon, rel_tol=_EPSILON_TOLERANCE):
        raise VerificationFailed(
            f"it states epsilon {spent.epsilon:.6g}, its mechanism gives {derived:.6g}"
        )
    _check_charged(said.data.name, spent, mechanism)
    allowed = privacy.epsilon * (1 + _EPSILON_TOLERANCE)
    if spent.delta != privacy.delta or spent.epsilon > allowed or spent.steps > manifest.most_steps:
        raise VerificationFailed("it spent more than the job asked for")


def _check_charged(dataset: str, spent: Spent, mechanism: PoissonSampledGaussian) -> None:
    """Calculate again what the site's ledger must have charged to each pool."""
    if dataset not in spent.charged or set(spent.charged) != set(spent.orders):
        raise VerificationFailed("it does not say what its dataset was charged, at which order")
    for pool, text in spent.charged.items():
        cost, amount = pricing.cost(mechanism, float(spent.orders[pool])), int(text)
        if not math.isclose(amount, cost, rel_tol=AMOUNT_TOLERANCE, abs_tol=1.0):
            raise VerificationFailed(
                f"it charged {pool} {amount}, its mechanism costs {cost} at order "
                f"{spent.orders[pool]}"
            )


def needed_records(*, done: bool, spent: bool) -> set[str]:
    """Return the names of the log entries that a site proves."""
    needed = {"import", "admit", "settle" if spent else "release"}
    return needed | {"publish"} if done else needed


def _check_records(said: Statement, proofs: Mapping[str, LogProof]) -> None:
    if set(proofs) != needed_records(done=said.ended == "done", spent=said.spent is not None):
        raise VerificationFailed(f"it proves the records {sorted(proofs)}, not those of a site")
    if pointers(proofs) != {name: one.model_dump() for name, one in said.records.items()}:
        raise VerificationFailed("its statement points to other log entries than it proves")
    if said.ended == "done" and said.spent is None:
        raise VerificationFailed("it has ended the job and spent nothing on it")
    if (said.ended == "done") is (said.model_sha256 is None):
        raise VerificationFailed("a site that has ended the job publishes, and no other one")
    log_key = Verifier.parse(said.log_vkey)
    resource = f"Dataset::{said.data.name}"
    job: dict[str, object] = {"/resource": resource, "/details/job": said.job}
    expected: dict[str, dict[str, object]] = {
        "import": {
            "/resource": resource,
            "/details/fingerprint": said.data.fingerprint,
            "/details/unit": said.data.unit,
            "/details/classification": said.data.classification,
        },
        "admit": job | {"/details/manifest_sha256": said.manifest_sha256},
        "release": job,
        "publish": job | {"/details/digest": said.model_sha256},
    }
    if said.spent is not None:
        spent = {"/details/mechanism": said.spent.mechanism, "/details/costs": said.spent.charged}
        expected["settle"] = job | spent
    for name, proof in proofs.items():
        entry = verify_proof(proof, log_key)
        for place, value in {**_ENTRIES[name], **expected[name]}.items():
            if found_at(entry, place) != value:
                raise VerificationFailed(f"its record {name!r} says otherwise: {place}")
        if name == "import" and not said.data.units <= found_at(entry, "/details/units"):
            raise VerificationFailed("it states more units than it has imported")
