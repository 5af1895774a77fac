"""The proof that one entry stands in a signed log, verified offline and without a database."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import rfc8785

from llmos.crypto.merkle import leaf_hash
from llmos.crypto.notes import Checkpoint, Verifier, decode_base64, encode_base64, open_note
from llmos.errors import RequestError, VerificationFailed
from llmos.kernel.auditlog import AuditLog, tampered
from llmos.transparency.audit_paths import (
    consistency_proof,
    inclusion_proof,
    read_at_once,
    verify_inclusion,
)

PROOF_SCHEMA: Final = "llmos.log-proof/v1"


@dataclass(frozen=True, slots=True)
class LogProof:
    """An entry, its audit path and the signed checkpoint that the path leads to."""

    index: int
    size: int  # entries in the log when the proof was made
    hashes: tuple[bytes, ...]  # from the leaf's sibling up to the root's child
    checkpoint_note: str
    entry: bytes  # canonical JSON (RFC 8785), the bytes that were hashed

    def to_dict(self) -> dict[str, Any]:
        """Describe the proof as plain JSON values."""
        return {
            "schema": PROOF_SCHEMA,
            "index": self.index,
            "size": self.size,
            "hashes": [encode_base64(node) for node in self.hashes],
            "checkpoint": self.checkpoint_note,
            "entry": self.entry.decode(),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LogProof:
        """Read what `to_dict` wrote.

        Raises:
            VerificationFailed: a field is missing or of another type.
        """
        match fields:
            case {
                "schema": "llmos.log-proof/v1",
                "index": int(index),
                "size": int(size),
                "hashes": list(hashes),
                "checkpoint": str(note),
                "entry": str(entry),
            } if all(isinstance(node, str) for node in hashes):
                nodes = tuple(decode_base64(node) for node in hashes)
            case _:
                raise VerificationFailed("this is not a log proof")
        try:
            return cls(index, size, nodes, note, entry.encode())
        except UnicodeEncodeError as error:
            raise VerificationFailed("the log proof's entry is not text") from error


def prove(log: AuditLog, index: int, *, kept: str | None = None) -> LogProof:
    """Return the proof that entry `index` stands in a log.

    Args:
        log: the log.
        index: the entry's place.
        kept: an older checkpoint of this log to lead to instead of the newest.

    Raises:
        RequestError: there is no such entry.
        TamperedLog: the stored hashes do not lead from the entry to the signed root.
        VerificationFailed: `kept` is not a checkpoint that this log signed.
    """
    with log.tree(kept) as (head, note, read):
        if not 0 <= index < head.size:
            raise RequestError(f"the log has no entry {index}; its last is {head.size - 1}")
        hashes = read_at_once(partial(inclusion_proof, index, head.size), read)
    found = log.entries(index - 1, 1)
    if not found or found[0].index != index:
        raise tampered(f"entry {index} is missing")
    entry = rfc8785.dumps(found[0].fields)  # the bytes that were hashed, else the path says so
    if not verify_inclusion(index, head.size, leaf_hash(entry), hashes, head.root):
        raise tampered(f"entry {index} or a hash above it was changed")
    return LogProof(index, head.size, hashes, note, entry)


def prove_consistency(log: AuditLog, old_size: int, size: int | None = None) -> tuple[bytes, ...]:
    """Return the proof that a log's first `old_size` entries begin its first `size`, or all.

    Raises:
        RequestError: the log never had that size.
    """
    with log.tree() as (newest, _, read):
        size = newest.size if size is None else size
        if not 0 <= old_size <= size <= newest.size:
            raise RequestError(f"the log has {newest.size} entries, it never had {old_size}")
        return read_at_once(partial(consistency_proof, old_size, size), read)


def verify_proof(proof: LogProof, verifier: Verifier) -> dict[str, Any]:
    """Return the entry if the log that `verifier` signs for contains it.

    Raises:
        VerificationFailed: signature, log name, size or audit path do not agree.
    """
    checkpoint = Checkpoint.parse(open_note(proof.checkpoint_note, verifier))
    if checkpoint.origin != verifier.name:
        raise VerificationFailed(f"the checkpoint is of the log {checkpoint.origin!r}")
    if checkpoint.size != proof.size:
        raise VerificationFailed("the proof and its checkpoint are of different sizes")
    leaf = leaf_hash(proof.entry)
    if not verify_inclusion(proof.index, proof.size, leaf, proof.hashes, checkpoint.root):
        raise VerificationFailed(f"the log does not contain this entry at index {proof.index}")
    try:
        entry = json.loads(proof.entry)
    except ValueError as error:
        raise VerificationFailed("the entry is not JSON") from error
    if not isinstance(entry, dict):
        raise VerificationFailed("the entry is not a JSON object")
    return entry
