"""The witness cosigns what continues what it saw, and nothing else: compared with a plain model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, select
from tests.homes import close, last_records, log_size

from llmos import system as systems
from llmos.crypto.notes import Checkpoint, NoteKey, sign_note
from llmos.errors import (
    AccessError,
    CheckpointRefused,
    LlmosError,
    PermissionDenied,
    RequestError,
    StaleCheckpoint,
    UnknownPartner,
)
from llmos.kernel.identity import Role
from llmos.kernel.policy import Action
from llmos.system import System
from llmos.transparency.audit_paths import consistency_proof
from llmos.transparency.cosignatures import verify_cosignature
from llmos.transparency.tables import log_partners, witnessed
from llmos.workflows.witness import Witness

PARTNER = NoteKey("llmos.local/partner", bytes(range(32)))
STRANGER = NoteKey("llmos.local/partner", bytes(32))
SHARED = 5
HISTORIES = [  # the same log twice, told in two ways after its first entries
    [b"%d" % n if n < SHARED else b"%s%d" % (name, n) for n in range(12)] for name in (b"a", b"b")
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    made = systems.create(tmp_path_factory.mktemp("witness") / "home")
    made.log.add_partner("partner", PARTNER.vkey)
    yield made
    close(made)


@pytest.fixture
def witness(home: System) -> Witness:
    forget(home)
    kernel = home.kernel
    return Witness(kernel.store, kernel.monitor, kernel.auditlog.key, home.kernel.home)


def forget(home: System) -> None:
    with home.kernel.monitor.act(home.who, Action.MANAGE_PARTNERS, home.kernel.home) as conn:
        conn.execute(delete(witnessed))


def hashed(leaves: Sequence[bytes]) -> bytes:
    if len(leaves) < 2:
        return hashlib.sha256(b"\0" + leaves[0] if leaves else b"").digest()
    k = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\1" + hashed(leaves[:k]) + hashed(leaves[k:])).digest()


def note_of(leaves: Sequence[bytes], key: NoteKey = PARTNER) -> str:
    return sign_note(Checkpoint(PARTNER.name, len(leaves), hashed(leaves)).text(), key)


def proof_of(leaves: Sequence[bytes], old_size: int, size: int) -> tuple[bytes, ...]:
    if old_size > size:
        return ()
    return consistency_proof(
        old_size, size, lambda level, i: hashed(leaves[i << level : (i + 1) << level])
    )


def expected(seen: list[bytes], leaves: list[bytes], old: int, size: int) -> type | None:
    """Say in words of lists what the specification says in words of trees."""
    if old > size:
        return RequestError
    if old != len(seen) or (old == size and leaves[:size] != seen):
        return StaleCheckpoint
    return None if leaves[:old] == seen else CheckpointRefused


SIZES = st.integers(0, 12)
REQUESTS = st.lists(st.tuples(st.sampled_from(HISTORIES), SIZES | st.none(), SIZES), max_size=8)


@settings(max_examples=40, deadline=None)
@given(REQUESTS)
def test_the_witness_behaves_as_a_list_of_entries_would(
    home: System, requests: list[tuple[list[bytes], int | None, int]]
) -> None:
    forget(home)
    kernel = home.kernel
    witness = Witness(kernel.store, kernel.monitor, kernel.auditlog.key, home.kernel.home)
    seen: list[bytes] = []
    for leaves, asked, size in requests:
        old = len(seen) if asked is None else asked  # most random sizes would only be stale
        proof, note = proof_of(leaves, old, size), note_of(leaves[:size])
        refusal = expected(seen, leaves, old, size)
        if refusal is None:
            line = witness.add_checkpoint(home.who, old, proof, note)
            text = note.partition("\n\n")[0] + "\n"
            assert verify_cosignature(line, text, kernel.auditlog.key.verifier)
            seen = leaves[:size]
        else:
            with pytest.raises(LlmosError) as caught:
                witness.add_checkpoint(home.who, old, proof, note)
            assert type(caught.value) is refusal
        with kernel.store.read() as conn:
            row = conn.execute(select(witnessed.c.size, witnessed.c.root)).one_or_none()
        assert (row or (0, hashed([]))) == (len(seen), hashed(seen))


def test_what_was_witnessed_is_recorded_once(home: System, witness: Witness) -> None:
    leaves = HISTORIES[0]
    before = log_size(home)
    witness.add_checkpoint(home.who, 0, (), note_of(leaves[:7]))
    record = last_records(home, 1)[0]
    assert (record["action"], record["outcome"]) == ("witness", "done")
    assert (record["details"]["partner"], record["details"]["size"]) == ("partner", 7)
    for _ in range(3):  # whoever saw the checkpoint can send it again
        witness.add_checkpoint(home.who, 7, (), note_of(leaves[:7]))
    for old, proof in ((3, ()), (7, (bytes(32),))):
        with pytest.raises(CheckpointRefused):
            witness.add_checkpoint(home.who, old, proof, note_of(leaves[:9]))
    assert log_size(home) == before + 1


def test_a_stale_request_is_told_the_size(home: System, witness: Witness) -> None:
    witness.add_checkpoint(home.who, 0, (), note_of(HISTORIES[0][:7]))
    with pytest.raises(StaleCheckpoint) as caught:
        witness.add_checkpoint(home.who, 0, (), note_of(HISTORIES[0][:9]))
    assert caught.value.size == 7


def test_only_partners_are_witnessed(home: System, witness: Witness) -> None:
    other = NoteKey("llmos.local/other", bytes(32))
    unknown = sign_note(Checkpoint(other.name, 1, bytes(32)).text(), other)
    with pytest.raises(UnknownPartner):
        witness.add_checkpoint(home.who, 0, (), unknown)
    with pytest.raises(UnknownPartner):
        witness.add_checkpoint(home.who, 0, (), "")
    with pytest.raises(AccessError, match=r"wrong|not signed"):
        witness.add_checkpoint(home.who, 0, (), note_of(HISTORIES[0], STRANGER))
    with pytest.raises(AccessError, match="no signatures"):
        witness.add_checkpoint(home.who, 0, (), f"{PARTNER.name}\n")
    with pytest.raises(RequestError, match="not a checkpoint"):
        witness.add_checkpoint(home.who, 0, (), sign_note(f"{PARTNER.name}\nx\n", PARTNER))


def test_policy_may_forbid_to_witness(home: System, witness: Witness) -> None:
    with home.kernel.store.transaction() as conn:
        dev = home.kernel.identity.add_principal(conn, "dev", frozenset({Role.DEVELOPER}))
    with pytest.raises(PermissionDenied):
        witness.add_checkpoint(dev, 0, (), note_of(HISTORIES[0]))
    with home.kernel.store.read() as conn:
        assert conn.execute(select(witnessed)).all() == []


def test_a_partner_that_is_removed_and_added_again_cannot_go_back(
    home: System, witness: Witness
) -> None:
    witness.add_checkpoint(home.who, 0, (), note_of(HISTORIES[0][:7]))
    home.log.remove_partner("partner")
    with pytest.raises(UnknownPartner):
        witness.add_checkpoint(home.who, 7, (), note_of(HISTORIES[0][:7]))
    home.log.add_partner("partner", PARTNER.vkey)
    with pytest.raises(StaleCheckpoint):
        witness.add_checkpoint(home.who, 0, (), note_of(HISTORIES[0][:6]))
    with home.kernel.store.read() as conn:
        assert len(conn.execute(select(log_partners)).all()) == 1
