"""Log proofs: what an auditor verifies offline, and every change to one is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.crypto.merkle import leaf_hash, node_hash
from llmos.crypto.notes import Checkpoint, NoteKey, sign_note
from llmos.errors import VerificationFailed
from llmos.transparency.proofs import LogProof, verify_proof

KEY = NoteKey("llmos.local/0123", bytes(range(32)))
ENTRY = b'{"action":"report","v":1}'
SIBLING = leaf_hash(b"{}")


def signed(root: bytes, *, origin: str = KEY.name, size: int = 2) -> str:
    return sign_note(Checkpoint(origin, size, root).text(), KEY)


def proof_of(entry: bytes) -> LogProof:
    return LogProof(1, 2, (SIBLING,), signed(node_hash(SIBLING, leaf_hash(entry))), entry)


PROOF = proof_of(ENTRY)


def test_a_proof_survives_json_and_verifies() -> None:
    read = LogProof.from_dict(json.loads(json.dumps(PROOF.to_dict())))
    assert read == PROOF
    assert verify_proof(read, KEY.verifier) == {"action": "report", "v": 1}


@pytest.mark.parametrize(
    ("proof", "message"),
    [
        (replace(PROOF, index=0), "does not contain"),
        (replace(PROOF, size=3), "different sizes"),
        (replace(PROOF, hashes=()), "does not contain"),
        (replace(PROOF, entry=ENTRY + b" "), "does not contain"),
        (replace(PROOF, checkpoint_note="x"), "note"),
        (replace(PROOF, checkpoint_note=signed(bytes(32))), "does not contain"),
        (replace(PROOF, checkpoint_note=signed(bytes(32), origin="other")), "log 'other'"),
        (replace(PROOF, checkpoint_note=sign_note("hello\n", KEY)), "not a checkpoint"),
        (proof_of(b"not json"), "not JSON"),
        (proof_of(b"[]"), "not a JSON object"),
    ],
)
def test_a_proof_that_does_not_hold(proof: LogProof, message: str) -> None:
    with pytest.raises(VerificationFailed, match=message):
        verify_proof(proof, KEY.verifier)


def test_another_logs_key_does_not_verify() -> None:
    with pytest.raises(VerificationFailed, match="not signed by"):
        verify_proof(PROOF, NoteKey(KEY.name, bytes(32)).verifier)


@pytest.mark.parametrize(
    "fields",
    [
        {"schema": "llmos.log-proof/v2"},
        {"index": "1"},
        {"size": None},
        {"hashes": "AA=="},
        {"hashes": [1]},
        {"hashes": ["AA"]},
        {"checkpoint": 1},
        {"entry": {}},
        {"entry": "\ud800"},
    ],
)
def test_json_that_is_no_proof(fields: dict[str, Any]) -> None:
    with pytest.raises(VerificationFailed):
        LogProof.from_dict(PROOF.to_dict() | fields)
    with pytest.raises(VerificationFailed, match="not a log proof"):
        LogProof.from_dict({})


@given(st.integers(min_value=0))
def test_every_flipped_bit_is_refused(position: int) -> None:
    fields = PROOF.to_dict()
    parts = [fields["checkpoint"], fields["entry"], fields["hashes"][0]]
    which, place = position % 3, position // 3
    data = bytearray(parts[which].encode())
    bit = place % (8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    parts[which] = data.decode("utf-8", "surrogateescape")
    changed = dict(zip(("checkpoint", "entry"), parts, strict=False)) | {"hashes": [parts[2]]}
    with pytest.raises(VerificationFailed):
        verify_proof(LogProof.from_dict(fields | changed), KEY.verifier)
