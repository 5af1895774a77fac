"""Verifiers that we did not write accept our proofs, checkpoints and cosignatures, and only those.

`sigstore` is the client of Rekor, `proofbundle` an independent implementation of the C2SP formats.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import proofbundle.checkpoint as peer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from proofbundle import merkle as peer_merkle
from sigstore._internal import merkle as sigstore_merkle
from sigstore._internal.rekor.checkpoint import SignedCheckpoint
from sigstore.errors import VerificationError
from tests.databases import open_store

from llmos.crypto.notes import Checkpoint, NoteKey, open_note
from llmos.kernel.auditlog import AuditLog
from llmos.kernel.schema import KERNEL
from llmos.transparency.cosignatures import cosign, verify_cosignature
from llmos.transparency.proofs import LogProof, prove, prove_consistency

KEY = NoteKey("llmos.local/0123", bytes(range(32)))
WITNESS = NoteKey("llmos.local/b0b0", bytes(range(1, 33)))
SIZE = 75


@pytest.fixture(scope="module")
def notes(log: AuditLog) -> list[str]:
    """Grow the log entry by entry and keep the checkpoint of every size."""
    kept = []
    for number in range(SIZE):
        with log.store.transaction() as conn:
            log.append(conn, {"number": number})
        kept.append(log.checkpoint())
    return kept


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AuditLog]:
    store = open_store(tmp_path_factory.mktemp("log") / "kernel.db", KERNEL)
    yield AuditLog(store, KEY)
    store.close()


def head_of(note: str) -> Checkpoint:
    return Checkpoint.parse(open_note(note, KEY.verifier))


def sigstore_verifies(proof: LogProof, entry: bytes) -> bool:
    inclusion = SimpleNamespace(
        log_index=proof.index,
        tree_size=proof.size,
        hashes=list(proof.hashes),
        root_hash=head_of(proof.checkpoint_note).root,
    )
    inner = SimpleNamespace(inclusion_proof=inclusion, canonicalized_body=entry)
    try:
        sigstore_merkle.verify_merkle_inclusion(SimpleNamespace(_inner=inner))
    except VerificationError:
        return False
    return True


def peer_verifies(proof: LogProof, entry: bytes) -> bool:
    root = head_of(proof.checkpoint_note).root
    return bool(
        peer_merkle.verify_inclusion(entry, proof.index, proof.size, list(proof.hashes), root)
    )


def test_inclusion_proofs_of_many_sizes_are_accepted(log: AuditLog, notes: list[str]) -> None:
    for size in (1, 2, 3, 7, 8, 9, 31, 64, SIZE):
        for index in range(size):
            proof = prove(log, index, kept=notes[size - 1])
            for verifies in (sigstore_verifies, peer_verifies):
                assert verifies(proof, proof.entry)
                assert not verifies(proof, proof.entry + b" ")


@settings(max_examples=200, deadline=None)
@given(st.integers(1, SIZE), st.integers(1, SIZE))
def test_consistency_proofs_are_accepted(
    log: AuditLog, notes: list[str], first: int, second: int
) -> None:
    old, new = sorted((first, second))
    proof = list(prove_consistency(log, old, new))
    roots = (head_of(notes[old - 1]).root, head_of(notes[new - 1]).root)
    assert peer_merkle.verify_consistency(old, new, proof, *roots)
    assert not peer_merkle.verify_consistency(old, new, proof, bytes(32), roots[1])


def test_checkpoints_are_read_and_verified(notes: list[str]) -> None:
    for note in notes:
        head = head_of(note)
        theirs = SignedCheckpoint.from_text(note)
        read = theirs.checkpoint
        assert (read.origin, read.log_size, read.log_hash) == (
            KEY.name,
            head.size,
            head.root.hex(),
        )
        assert theirs.signed_note.signatures[0].sig_hash == KEY.key_id
        verified = peer.verify_checkpoint(note, KEY.vkey)
        assert (verified["ok"], verified["tree_size"]) == (True, head.size)
        assert not peer.verify_checkpoint(note.replace(f"\n{head.size}\n", "\n999\n"), KEY.vkey)[
            "ok"
        ]


def test_cosignatures_are_verified_by_them_and_theirs_by_us(notes: list[str]) -> None:
    witness_vkey = peer.cosign_vkey(WITNESS.name, WITNESS.verifier.public_key)
    note = notes[-1]
    text = head_of(note).text()
    ours = note + cosign(text, WITNESS, 1_700_000_000)
    verified = peer.verify_cosignature(ours, witness_vkey)
    assert (verified["ok"], verified["timestamp"]) == (True, 1_700_000_000)
    both = peer.verify_witnessed_checkpoint(
        ours, KEY.vkey, [witness_vkey], expected_origin=KEY.name
    )
    assert both["ok"]
    other = notes[-2] + cosign(text, WITNESS, 1_700_000_000)
    assert not peer.verify_cosignature(other, witness_vkey)["ok"]

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    signer = Ed25519PrivateKey.from_private_bytes(WITNESS.seed)
    theirs = peer.cosign_checkpoint(note, signer, WITNESS.name, 1_700_000_060)
    line = theirs.removeprefix(note)
    assert verify_cosignature(line, text, WITNESS.verifier) == 1_700_000_060
