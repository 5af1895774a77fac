"""Approvals: acts that take two people, one who asks and another one who decides.

A service account is neither: whoever runs it would be both. Nothing here can know that two
principals are one person.

The second person has to have shown who they are by an API key of their own; naming them is not
enough. The decision is made in the transaction of the act itself, and what was approved is kept
as a record that the home has signed. Whoever runs the machine and holds the root key can make
both people up: this rule binds everyone else.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final

import rfc8785
from sqlalchemy import Connection, Row, insert, select, update

from llmos.crypto import dsse
from llmos.crypto.notes import NoteKey
from llmos.errors import ApprovalConflict, UnknownApproval
from llmos.kernel.identity import Kind, Principal
from llmos.kernel.schema import approvals
from llmos.kernel.store import Store, now

RECORD_TYPE: Final = "application/vnd.llmos.approval+json"


class ApprovalState(StrEnum):
    """Where an approval stands; only an open one can change."""

    OPEN = "open"
    APPROVED = "approved"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Approval:
    """One act that was asked for."""

    id: str
    act: str
    subject: str
    request: dict[str, Any]
    reason: str
    proposer: str  # principal id
    proposed_at: str
    state: ApprovalState
    decider: str | None
    decided_at: str | None
    record: dict[str, Any] | None  # DSSE envelope
    used_at: str | None


@dataclass(frozen=True, slots=True)
class Approvals:
    """The approvals of one home."""

    store: Store
    key: NoteKey  # signs the records

    def propose(
        self,
        conn: Connection,
        who: Principal,
        act: str,
        subject: str,
        request: Mapping[str, Any],
        reason: str,
    ) -> Approval:
        """Ask for an act.

        Raises:
            ApprovalConflict: no reason is given, or `who` is no person.
        """
        _require_person(who)
        if not reason.strip():
            raise ApprovalConflict("an approval needs a reason", hint="say why, with --reason")
        approval_id = f"approval-{secrets.token_hex(4)}"
        conn.execute(
            insert(approvals).values(
                id=approval_id,
                act=act,
                subject=subject,
                request=rfc8785.dumps(dict(request)).decode(),
                reason=reason,
                proposer=who.id,
                proposed_at=now(),
                state=ApprovalState.OPEN,
            )
        )
        return _get(conn, approval_id)

    def decide(
        self, conn: Connection, who: Principal, approval_id: str, *, approve: bool
    ) -> Approval:
        """Approve or refuse an open act; do it in the same transaction when it is approved.

        Raises:
            UnknownApproval: there is none of this id.
            ApprovalConflict: it was decided before, `who` asked for it, is no person, or has not
                shown an API key.
        """
        _require_person(who)
        asked = _get(conn, approval_id)
        if asked.state is not ApprovalState.OPEN:
            raise ApprovalConflict(f"{approval_id} is {asked.state} already")
        if asked.proposer == who.id:
            raise ApprovalConflict(
                f"{who.name} asked for {approval_id}; it takes another person to decide",
                hint="run this as someone else, with their API key in LLMOS_API_KEY_FILE",
            )
        if who.key_id is None:
            raise ApprovalConflict(
                f"{who.name} has only been named; who decides must show an API key",
                hint="set LLMOS_API_KEY_FILE to a file that holds one of theirs",
            )
        state = ApprovalState.APPROVED if approve else ApprovalState.REFUSED
        decided = {"state": str(state), "decider": who.id, "decided_at": now()}
        payload = rfc8785.dumps(asdict(asked) | decided | {"decider_key": who.key_id})
        record = rfc8785.dumps(dsse.sign(payload, RECORD_TYPE, self.key)).decode()
        conn.execute(
            update(approvals).where(approvals.c.id == approval_id).values(**decided, record=record)
        )
        return _get(conn, approval_id)

    def use(
        self, conn: Connection, who: Principal, act: str, subject: str, request: Mapping[str, Any]
    ) -> str:
        """Use up what was approved for exactly this act and `who` asked for; return its id.

        Raises:
            UnknownApproval: there is none that was not used yet.
        """
        asked = (approvals.c.act == act) & (approvals.c.subject == subject)
        mine = (approvals.c.proposer == who.id) & (approvals.c.state == ApprovalState.APPROVED)
        exact = approvals.c.request == rfc8785.dumps(dict(request)).decode()
        fresh = select(approvals.c.id).where(asked, mine, exact, approvals.c.used_at.is_(None))
        approval_id = conn.execute(fresh).scalars().first()
        if approval_id is None:
            raise UnknownApproval(f"nobody has approved that {who.name} may {act} {subject}")
        conn.execute(update(approvals).where(approvals.c.id == approval_id).values(used_at=now()))
        return str(approval_id)

    def approval(self, approval_id: str) -> Approval:
        """Return an approval.

        Raises:
            UnknownApproval: there is none of this id.
        """
        with self.store.read() as conn:
            return _get(conn, approval_id)

    def approvals(self) -> tuple[Approval, ...]:
        """Return all approvals, oldest first."""
        order = (approvals.c.proposed_at, approvals.c.id)
        with self.store.read() as conn:
            return tuple(_approval(row) for row in conn.execute(select(approvals).order_by(*order)))


def _require_person(who: Principal) -> None:
    if who.kind is not Kind.PERSON:
        raise ApprovalConflict(f"{who.name} is a service account; this takes two people")


def _get(conn: Connection, approval_id: str) -> Approval:
    row = conn.execute(select(approvals).where(approvals.c.id == approval_id)).one_or_none()
    if row is None:
        raise UnknownApproval(
            f"there is no approval {approval_id!r}", hint="`llmos approval ls` lists them"
        )
    return _approval(row)


def _approval(row: Row[Any]) -> Approval:
    fields = dict(row._mapping)
    fields["request"] = json.loads(row.request)
    fields["state"] = ApprovalState(row.state)
    fields["record"] = None if row.record is None else json.loads(row.record)
    return Approval(**fields)
