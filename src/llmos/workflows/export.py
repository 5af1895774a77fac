"""Export a trained adapter in PEFT format: the only way out of the vault in the clear.

Where policy allows it to one person only with another one's approval, the first run proposes it and
says so; after the approval the proposer's next run writes the files, once.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection

from llmos.errors import ApprovalConflict, ModelError
from llmos.kernel.approvals import Approval, ApprovalState
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.models.registry import ModelEntry, ModelKind
from llmos.workflows import outputs
from llmos.workflows.parts import Parts

ACT: Final = "export"
_WANTED: Final = {"approval": "wanted"}  # to ask policy whether another person's would do


def run(model: str, folder: Path, who: Principal, parts: Parts, *, reason: str = "") -> list[Path]:
    """Write the adapter's files to a new folder and return them.

    Raises:
        ModelError: the model is a base model, whose files are in the clear already.
        PermissionDenied: policy forbids it.
        ApprovalConflict: it takes a second person, who has not approved it yet; it is proposed now,
            if there is a reason.
        StorageError: something is there already, or the folder cannot be written.
    """
    kernel, entry = parts.kernel, parts.registry.model(model)
    if entry.kind is not ModelKind.ADAPTER:
        raise ModelError(
            f"{model} is a base model", hint=f"its files are in {parts.registry.folder(entry)}"
        )
    approval = _approval(entry, who, parts, reason)
    context = {} if approval is None else {"approval": approval}
    details: dict[str, Any] = {"digest": entry.digest, **context}
    with kernel.monitor.admit(
        who,
        Action.EXPORT_MODEL,
        entry.resource,
        key=f"export-{model}",
        objects=frozenset({entry.location}),
        charge=None,
        context=context,
        details=details,
    ) as grant:
        files = parts.registry.open_adapter(model, grant)
        if approval is None:
            return outputs.write_folder(folder, files)
        act = kernel.monitor.act(
            who, Action.EXPORT_MODEL, entry.resource, details=details, context=context
        )
        with ExitStack() as undo:
            with act as conn:  # an approval that was used writes nothing
                kernel.approvals.use(conn, who, ACT, entry.name, _request(entry))
                written = outputs.write_folder(folder, files)
                undo.callback(shutil.rmtree, folder)  # a use that cannot be recorded is none
            undo.pop_all()
        return written


def perform(conn: Connection, approved: Approval) -> None:
    """Do nothing yet: the proposer writes the files, where they want them, and uses this up."""


def _approval(entry: ModelEntry, who: Principal, parts: Parts, reason: str) -> str | None:
    """Return the approval to use, or None where policy asks for none, or forbids it anyway."""
    kernel = parts.kernel
    ask = (who, Action.EXPORT_MODEL, entry.resource)
    if kernel.policy.decide(*ask, {}).allowed:
        return None
    if not kernel.policy.decide(*ask, _WANTED).allowed:
        return None  # the monitor denies and records it
    mine = {"act": ACT, "subject": entry.name, "proposer": who.id, "used_at": None}
    asked = [
        found
        for found in kernel.approvals.approvals()
        if found.request == _request(entry) and mine.items() <= asdict(found).items()
    ]
    if approved := [found.id for found in asked if found.state is ApprovalState.APPROVED]:
        return approved[0]
    waiting = [found.id for found in asked if found.state is ApprovalState.OPEN]
    if not waiting and reason.strip():
        waiting = [_propose(entry, who, parts, reason)]
    raise _not_approved(entry.name, waiting)


def _propose(entry: ModelEntry, who: Principal, parts: Parts, reason: str) -> str:
    details: dict[str, Any] = {"act": "propose", **_request(entry)}
    with parts.kernel.monitor.act(
        who, Action.EXPORT_MODEL, entry.resource, details=details, context=_WANTED
    ) as conn:
        request = _request(entry)
        asked = parts.kernel.approvals.propose(conn, who, ACT, entry.name, request, reason)
        details |= {"approval": asked.id, "reason": reason}
    return asked.id


def _request(entry: ModelEntry) -> dict[str, str]:
    """Say what is exported: not only its name, but these very weights."""
    return {"model": entry.name, "digest": entry.digest}


def _not_approved(model: str, waiting: list[str]) -> ApprovalConflict:
    why = f"{model} may hold data of people word for word; its export takes a second person"
    if not waiting:
        return ApprovalConflict(why, hint="say why, with --reason, and it is proposed to them")
    return ApprovalConflict(
        f"{why}, who has not approved {waiting[0]} yet",
        hint=f"they type `llmos approval approve {waiting[0]}`; then run this again",
    )
