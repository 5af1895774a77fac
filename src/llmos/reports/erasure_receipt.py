"""The erasure receipt: a signed in-toto statement of which keys were destroyed, and what stays.

Its subjects are the destroyed keys by the SHA-256 of their wrapped form. The person is named by the
keyed hash that stands in the log; the operator of the home can tell whose it is, the receipt alone
does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import rfc8785

from llmos.crypto import dsse
from llmos.crypto.notes import NoteKey, decode_base64
from llmos.privacy import PrivacyLoss
from llmos.reports.certificate import STATEMENT_TYPE
from llmos.transparency.proofs import LogProof

PREDICATE_TYPE: Final = "https://llmos.dev/erasure-receipt/v1"
MEDIA_TYPE: Final = "application/vnd.llmos.erasure-receipt.v1+json"
DIGEST_FIELD: Final = "receipt_sha256"  # in the details of the log entry

DONE: Final = (
    "The records are encrypted under keys that belonged to this person alone. Those keys were "
    "destroyed and the key database was written anew without them, so nobody can read the records "
    "in this home any more, not even with its root key.",
)
NOT_DONE: Final = (
    "No trained model is untrained: what a model learnt from this person before stays in it. "
    "For each model this receipt says what bounds that, if anything does.",
    "Backups and copies of keys.db made before hold the keys still; destroy them too.",
    "The file that the records were imported from is not touched, and no other copy outside of "
    "this home; importing it again brings the person back.",
    "Models, chats and reports that left this home are not called back.",
    "How many records the person had and how long they were can still be seen by who holds the "
    "root key, and that there was a person under this keyed hash.",
    "What a disk keeps beneath its files, such as spare blocks of an SSD, is out of reach here.",
)
UNBOUNDED: Final = "trained without privacy: nothing bounds what remains of this person in it"


@dataclass(frozen=True, slots=True)
class DestroyedKey:
    """One key that opened the person's records in one part of a dataset."""

    dataset: str
    part: str  # "training" or "held out"
    fingerprint: str  # SHA-256 of the part's stored form, hex; it stays as it was
    unit: str  # keyed hash
    key_sha256: str | None  # of the wrapped key, hex; None: the key database had none any more


@dataclass(frozen=True, slots=True)
class RemainingModel:
    """A model that was, or is being, trained on a dataset of the person."""

    name: str
    dataset: str
    state: str  # of its job
    digest: str | None  # SHA-256 over the model's files, hex; None before it is made
    loss: PrivacyLoss | None  # None: without privacy
    certificate_sha256: str | None  # of the newest certificate's statement

    def to_dict(self) -> dict[str, Any]:
        """Return what the receipt says about the model."""
        bounds = None
        if self.loss is not None:
            bounds = {
                "epsilon": self.loss.epsilon,
                "delta": self.loss.delta,
                "unit": self.loss.unit.column,
                "neighboring": str(self.loss.neighboring),
            }
        return {
            "model": self.name,
            "dataset": self.dataset,
            "state": self.state,
            "digest": self.digest,
            "guarantee": bounds,
            "warning": UNBOUNDED if bounds is None else None,
            "certificate_sha256": self.certificate_sha256,
        }


@dataclass(frozen=True, slots=True)
class Decision:
    """Who asked for the erasure, who decided on it, and where that is logged."""

    approval: str
    proposer: str
    decider: str
    decided_at: str
    log_index: int


def seal(
    issued_at: str,
    decision: Decision,
    destroyed: tuple[DestroyedKey, ...],
    models: tuple[RemainingModel, ...],
    key: NoteKey,
) -> dict[str, Any]:
    """Sign the statement and return its DSSE envelope."""
    keys = [asdict(destroyed_key) for destroyed_key in destroyed]
    statement: dict[str, Any] = {
        "_type": STATEMENT_TYPE,
        "subject": subjects(keys),
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "issued_at": issued_at,
            "issuer": key.name,
            "decision": asdict(decision),
            "destroyed": keys,
            "done": list(DONE),
            "models": [model.to_dict() for model in models],
            "not_done": list(NOT_DONE),
        },
    }
    return dsse.sign(rfc8785.dumps(statement), dsse.IN_TOTO, key)


def subjects(destroyed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the in-toto subjects of the keys in a predicate's `destroyed`."""
    return [
        {
            "name": f"{key['dataset']}, {key['part']}: {key['unit']}",
            "digest": {"sha256": key["key_sha256"]},
        }
        for key in destroyed
        if key["key_sha256"] is not None
    ]


def log_details(envelope: Mapping[str, Any]) -> dict[str, str]:
    """Return what the log entry of this receipt must hold in its details."""
    return {DIGEST_FIELD: hashlib.sha256(decode_base64(envelope["payload"])).hexdigest()}


def bundle(envelope: Mapping[str, Any], proof: LogProof) -> bytes:
    """Return the receipt file: canonical JSON of the envelope and its proof of being logged."""
    return rfc8785.dumps(
        {"mediaType": MEDIA_TYPE, "envelope": dict(envelope), "log_proof": proof.to_dict()}
    )
