from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmos.errors import VerificationFailed
from llmos.system import System
from llmos.workflows import verify


@pytest.fixture
def proof(system: System, tmp_path: Path) -> Path:
    path = tmp_path / "proofs" / "entry.json"
    system.log.prove(2, path)
    (path.parent / "home.pub").write_text(system.kernel.public_keys)
    return path


def test_a_log_entry_is_proven_with_the_keys_beside_it_or_with_named_ones(
    proof: Path, system: System, tmp_path: Path
) -> None:
    found = verify.run(proof, None)
    assert found["log_index"] == 2
    assert found["entry"] == system.log.read(after=1, limit=1)[0][1]
    keys = proof.with_name("home.pub").rename(tmp_path / "keys")
    assert verify.run(proof, keys) == found
    with pytest.raises(VerificationFailed, match="no public keys") as caught:
        verify.run(proof, None)
    assert "--key" in caught.value.hint


def test_a_changed_proof_is_refused(proof: Path) -> None:
    fields = json.loads(proof.read_bytes())
    data = proof.read_bytes()
    for position in range(0, len(data), max(1, len(data) // 40)):
        proof.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(VerificationFailed):
            verify.run(proof, None)
    proof.write_text(json.dumps(fields, indent=1))
    with pytest.raises(VerificationFailed):
        verify.run(proof, None)


@pytest.mark.parametrize(
    "data", [b"", b"7", b"[]", b"null", b"{}", b"\xff", b"{", b'{"envelope": 1}', b"[" * 100_000]
)
def test_a_file_that_is_no_proof_at_all(data: bytes, proof: Path) -> None:
    proof.write_bytes(data)
    with pytest.raises(VerificationFailed):
        verify.run(proof, None)


def test_files_that_cannot_be_read(proof: Path, tmp_path: Path) -> None:
    with pytest.raises(VerificationFailed, match="cannot be read"):
        verify.run(tmp_path / "nothing", None)
    with pytest.raises(VerificationFailed, match="cannot be read"):
        verify.run(tmp_path, None)
    for keys in (b"", b"one line\n", b"\xff\xfe\n", b"two\nlines\n"):
        (tmp_path / "keys").write_bytes(keys)
        with pytest.raises(VerificationFailed):
            verify.run(proof, tmp_path / "keys")


def test_keys_of_another_home_verify_nothing(proof: Path, system: System, tmp_path: Path) -> None:
    import llmos

    other = llmos.create(tmp_path / "other")
    with pytest.raises(VerificationFailed):
        verify.run(proof, tmp_path / "other" / "home.pub")
    other.kernel.store.close()
