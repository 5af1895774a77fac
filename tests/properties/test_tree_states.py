"""The log against a list of its entries, and RFC 6962 as its text defines it."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import pytest
import rfc8785
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmos.crypto.notes import Checkpoint, NoteKey, open_note
from llmos.errors import RequestError
from llmos.kernel.auditlog import AuditLog
from llmos.kernel.schema import KERNEL
from llmos.kernel.store import Store
from llmos.transparency import proofs
from llmos.transparency.audit_paths import verify_consistency

KEY = NoteKey("llmos.local/0123", bytes(range(32)))


def root_of(entries: list[bytes]) -> bytes:
    """Return MTH of RFC 6962 section 2.1, word for word."""
    if not entries:
        return hashlib.sha256(b"").digest()
    if len(entries) == 1:
        return hashlib.sha256(b"\x00" + entries[0]).digest()
    split = 1
    while 2 * split < len(entries):
        split *= 2
    halves = root_of(entries[:split]) + root_of(entries[split:])
    return hashlib.sha256(b"\x01" + halves).digest()


class Abandoned(Exception):
    """What the act of an entry raised."""


class TreeAndList(RuleBasedStateMachine):
    """Whatever is appended, abandoned and reopened: every size's root and proofs are the list's."""

    @initialize()
    def make(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.entries: list[bytes] = []
        self.notes: list[str] = []  # checkpoints that somebody kept
        self.log = self.opened()

    def opened(self) -> AuditLog:
        return AuditLog(Store.open(Path(self.folder.name) / "kernel.db", KERNEL), KEY)

    @rule(count=st.integers(1, 9))
    def append(self, count: int) -> None:
        new = [{"number": len(self.entries) + more} for more in range(count)]
        with self.log.store.transaction() as conn:
            indices = self.log.append_all(conn, new)
        assert indices == range(len(self.entries), len(self.entries) + count)
        self.entries += [rfc8785.dumps(entry) for entry in new]

    @rule(count=st.integers(1, 3))
    def append_and_abandon(self, count: int) -> None:
        def act() -> None:
            with self.log.store.transaction() as conn:
                self.log.append_all(conn, [{"lost": True}] * count)
                raise Abandoned

        with pytest.raises(Abandoned):
            act()

    @rule()
    def reopen(self) -> None:
        self.log.store.close()
        self.log = self.opened()

    @precondition(lambda self: self.entries)
    @rule()
    def keep_checkpoint(self) -> None:
        note = self.log.checkpoint()
        head = Checkpoint.parse(open_note(note, KEY.verifier))
        assert (head.size, head.root) == (len(self.entries), root_of(self.entries))
        self.notes.append(note)

    @precondition(lambda self: self.notes)
    @rule(data=st.data())
    def prove(self, data: st.DataObject) -> None:
        note = data.draw(st.sampled_from(self.notes))
        head = Checkpoint.parse(open_note(note, KEY.verifier))
        index = data.draw(st.integers(0, head.size - 1))
        proof = proofs.prove(self.log, index, kept=note)
        assert (proof.size, proof.entry) == (head.size, self.entries[index])
        assert rfc8785.dumps(proofs.verify_proof(proof, KEY.verifier)) == self.entries[index]
        with pytest.raises(RequestError):
            proofs.prove(self.log, head.size, kept=note)

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def prove_consistency(self, data: st.DataObject) -> None:
        new = data.draw(st.integers(1, len(self.entries)))
        old = data.draw(st.integers(0, new))
        roots = (root_of(self.entries[:old]), root_of(self.entries[:new]))
        proof = proofs.prove_consistency(self.log, old, new)
        assert verify_consistency(old, new, *roots, proof)
        if old:  # of an empty tree everything is a continuation
            assert not verify_consistency(old, new, roots[0], bytes(32), proof)

    @precondition(lambda self: self.notes)
    @rule(data=st.data())
    def verify_against_what_was_kept(self, data: st.DataObject) -> None:
        kept = data.draw(st.sampled_from(self.notes))
        assert self.log.verify(kept=kept).size == len(self.entries)

    @invariant()
    def every_entry_is_read_back(self) -> None:
        found = self.log.entries(limit=1000)
        assert [entry.index for entry in found] == list(range(len(self.entries)))
        assert [rfc8785.dumps(entry.fields) for entry in found] == self.entries

    def teardown(self) -> None:
        self.log.store.close()
        self.folder.cleanup()


TestTreeAndList = TreeAndList.TestCase
TestTreeAndList.settings = settings.get_profile("machines")
