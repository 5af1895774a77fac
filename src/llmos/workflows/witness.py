"""A home as witness of its partners' logs: it cosigns only what continues what it saw before.

Specification: https://c2sp.org/tlog-witness. A partner that was rolled back, or that shows two
histories, gets no cosignature. What was seen last is stored before the cosignature leaves.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select

from llmos.crypto.merkle import EMPTY_ROOT
from llmos.crypto.notes import Checkpoint, NoteKey, Verifier, encode_base64, open_note
from llmos.errors import (
    AccessError,
    CheckpointRefused,
    RequestError,
    StaleCheckpoint,
    UnknownPartner,
    VerificationFailed,
)
from llmos.kernel.identity import Principal
from llmos.kernel.monitor import Monitor
from llmos.kernel.policy import Action, Resource
from llmos.kernel.store import Store, now
from llmos.transparency.audit_paths import verify_consistency
from llmos.transparency.cosignatures import cosign
from llmos.transparency.tables import log_partners, witnessed


@dataclass(frozen=True, slots=True)
class Witness:
    """Cosigns with the home's log key, under a key id of its own."""

    store: Store
    monitor: Monitor
    key: NoteKey
    home: Resource

    def add_checkpoint(
        self, who: Principal, old_size: int, proof: Sequence[bytes], note: str
    ) -> str:
        """Return the cosignature line of a partner's checkpoint after it was stored as the last.

        Refusals are not recorded, and neither is a checkpoint that was cosigned before: anybody can
        send them, and the log must not grow at anybody's will.

        Raises:
            UnknownPartner: the checkpoint's origin is not the log of a partner.
            AccessError: it is not signed by the partner's key, or policy forbids `who` to witness.
            RequestError: it is no checkpoint, or is smaller than `old_size`.
            StaleCheckpoint: `old_size` is not what was witnessed last, or at that size there was
                another root.
            CheckpointRefused: the proof does not lead from what was witnessed last to it.
        """
        with self.store.read() as conn:
            partner, verifier = _partner(conn, note.partition("\n")[0])
            head = _signed_head(note, verifier)
            if old_size > head.size:
                raise RequestError(f"old size {old_size} is larger than the checkpoint")
            _require_continuation(conn, head, old_size, proof)
        if head.size != old_size:
            details = {"partner": partner, "size": head.size, "root": encode_base64(head.root)}
            with self.monitor.act(who, Action.WITNESS, self.home, details=details) as conn:
                # another request may have come first
                _require_continuation(conn, head, old_size, proof)
                conn.execute(delete(witnessed).where(witnessed.c.origin == head.origin))
                row = {"origin": head.origin, "size": head.size, "root": head.root, "at": now()}
                conn.execute(insert(witnessed).values(vkey=verifier.vkey, **row))
        return cosign(head.text(), self.key, int(time.time()))


def _partner(conn: Connection, origin: str) -> tuple[str, Verifier]:
    for name, vkey in conn.execute(select(log_partners.c.name, log_partners.c.vkey)):
        if (verifier := Verifier.parse(vkey)).name == origin:
            return name, verifier
    raise UnknownPartner(f"{origin!r} is not the log of a partner")


def _signed_head(note: str, verifier: Verifier) -> Checkpoint:
    try:
        text = open_note(note, verifier)
    except VerificationFailed as error:
        raise AccessError(error.message) from error
    try:
        return Checkpoint.parse(text)
    except VerificationFailed as error:
        raise RequestError(error.message) from error


def _require_continuation(
    conn: Connection, head: Checkpoint, old_size: int, proof: Sequence[bytes]
) -> None:
    last = select(witnessed.c.size, witnessed.c.root).where(witnessed.c.origin == head.origin)
    size, root = conn.execute(last).one_or_none() or (0, EMPTY_ROOT)
    if size != old_size or (size == head.size and root != head.root):
        raise StaleCheckpoint(size)
    if not verify_consistency(size, head.size, root, head.root, proof):
        raise CheckpointRefused(f"it does not continue the {size} entries that were witnessed")
