"""Sweep the vault: remove what a crash left behind between writing an object and naming it."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import select

from llmos.errors import RequestError
from llmos.federations import invitations, register
from llmos.jobs.tables import job_steps
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.kernel.schema import object_keys
from llmos.kernel.store import timestamp
from llmos.models.registry import ModelKind
from llmos.workflows.parts import Parts

YOUNGEST: Final = timedelta(hours=1)  # what is younger may be about to be named
DEFAULT_AGE: Final = timedelta(days=1)


def run(who: Principal, parts: Parts, *, older_than: timedelta = DEFAULT_AGE) -> dict[str, int]:
    """Delete objects that nothing names, and files that have no key; return how many of each.

    The record says which, before any of them goes; a crash leaves some for the next sweep.

    Raises:
        PermissionDenied: policy does not allow it; the denial is recorded.
        RequestError: `older_than` is so short that an import under way could lose its objects.
        StorageError: someone is reading, so that keys are on the disk still; sweep again.
    """
    if older_than < YOUNGEST:
        raise RequestError("objects of the last hour may be about to be used; they are not swept")
    kernel = parts.kernel
    details: dict[str, Any] = {"act": "sweep"}
    with kernel.monitor.act(who, Action.MANAGE_VAULT, kernel.home, details=details):
        details["objects"] = strays(parts, datetime.now(UTC) - older_than)
    for object_id in details["objects"]:  # outside of the act: erasing waits for transactions
        kernel.vault.delete(object_id)
    files = kernel.vault.sweep(older_than_s=older_than.total_seconds())
    return {"objects": len(details["objects"]), "files": files}


def strays(parts: Parts, before: datetime) -> list[str]:
    """Return the objects made before then that no dataset, model or job names, by id."""
    # Keys first: what is named meanwhile is then not taken for a stray.
    with parts.kernel.vault.keyring.store.read() as conn:
        old = select(object_keys.c.object_id).where(object_keys.c.created_at < timestamp(before))
        found = set(conn.execute(old).scalars())
    named: set[str | None] = set()
    for card in parts.datasets.cards():
        named |= {card.object_id, card.holdout_object_id, card.canary_object_id}
    named |= {m.location for m in parts.registry.models() if m.kind is ModelKind.ADAPTER}
    named |= {job.checkpoint for job in parts.jobs.jobs()}
    named |= {job.checkpoint for job in register.jobs(parts.kernel.store)}
    named |= {job.update_object for job in invitations.invitations(parts.kernel.store)}
    with parts.kernel.store.read() as conn:  # trained, and not published yet
        for result in conn.execute(select(job_steps.c.result)).scalars():
            named.add(json.loads(result).get("adapter"))
    return sorted(found - named)
