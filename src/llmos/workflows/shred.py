"""Shred what an approved erasure names, and sign its receipt (crypto-shredding).

The decision is in kernel.db before anything is destroyed; from then on no reader opens the person's
records. Then the keys in keys.db are destroyed and that database is written anew. Only after that
the receipt is signed and logged. Whatever was cut off in between is done when the home is opened
next: each stage can be done again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, select

from llmos.data import erasures
from llmos.data.datasets import DatasetCard
from llmos.data.erasures import ErasedUnit
from llmos.errors import ApprovalConflict, IntegrityError, UnknownApproval
from llmos.federations import invitations
from llmos.federations.invitations import InvitationState
from llmos.jobs.jobs import JobState
from llmos.kernel.approvals import Approval
from llmos.kernel.auditlog import LogEntry
from llmos.kernel.identity import Principal
from llmos.kernel.monitor import Outcome
from llmos.kernel.policy import Action
from llmos.kernel.schema import principals
from llmos.kernel.store import now
from llmos.models.registry import ModelKind
from llmos.reports import certificate as certificates
from llmos.reports import erasure_receipt as receipts
from llmos.reports.erasure_receipt import Decision, DestroyedKey, RemainingModel
from llmos.transparency import proofs
from llmos.workflows import checkpoints, outputs
from llmos.workflows.origin import dataset_of, guarantee, of_manifest, of_request, origin
from llmos.workflows.parts import Parts

_PAGE_OF_LOG: Final = 1000
_TRAINING: Final = "training"
_HELD_OUT: Final = "held out"


def finish(parts: Parts) -> None:
    """Destroy what approved erasures name and sign their receipts; nothing to do is the rule.

    A key that a restored backup of keys.db has brought back is destroyed again.

    Raises:
        StorageError: the disk is full, or someone is reading; the next start does it.
    """
    with parts.kernel.store.read() as conn:
        waiting = erasures.unfinished(conn)
    for approval_id in waiting:
        with suppress(ApprovalConflict):  # another process was quicker
            _finish(parts.kernel.approvals.approval(approval_id), parts)
        receipt(approval_id, parts)
    for approval_id, count in _destroy_revived(parts).items():
        approved = parts.kernel.approvals.approval(approval_id)
        details = {"approval": approval_id, "destroyed_again": count}
        with _fulfilling(approved, details, parts):
            pass


def receipt(approval_id: str, parts: Parts, folder: Path | None = None) -> tuple[Path, Path]:
    """Write the receipt of an erasure and the public keys beside it, and return both files.

    Raises:
        UnknownApproval: there is none of this id, or it erased nobody.
        StorageError: they cannot be written.
    """
    kernel = parts.kernel
    with kernel.store.read() as conn:
        envelope = erasures.receipt(conn, approval_id)
    if envelope is None:
        raise UnknownApproval(
            f"{approval_id} is no erasure that was done", hint="`llmos approval ls` lists them"
        )
    digest = receipts.log_details(envelope)[receipts.DIGEST_FIELD]
    index = _newest(parts, Action.ERASE_DATA, receipts.DIGEST_FIELD, digest)
    file = receipt_path(folder or kernel.config.home / "reports", approval_id)
    public_keys = file.with_name("home.pub")
    outputs.write(public_keys, kernel.public_keys.encode())
    outputs.write(file, receipts.bundle(envelope, proofs.prove(kernel.auditlog, index)))
    return file, public_keys


def receipt_path(folder: Path, approval_id: str) -> Path:
    """Return where a receipt is written in a folder."""
    return folder / f"{approval_id}.receipt.json"


def _finish(approved: Approval, parts: Parts) -> None:
    kernel = parts.kernel
    with kernel.store.read() as conn:
        units = erasures.units(conn, approved.id)
    digests = kernel.vault.keyring.destroy_units(unit.key for unit in units)
    _drop_checkpoints({unit.dataset for unit in units}, parts)
    destroyed = [
        _destroyed(unit, parts.datasets.card(unit.dataset), digests[unit.key]) for unit in units
    ]
    trained = {key.dataset for key in destroyed if key.part == _TRAINING}
    decision = Decision(
        approval=approved.id,
        proposer=_name(approved.proposer, parts),
        decider=_name(str(approved.decider), parts),
        decided_at=str(approved.decided_at),
        log_index=_newest(parts, Action.APPROVE, "approval", approved.id),
    )
    envelope = receipts.seal(
        now(), decision, tuple(destroyed), tuple(_models(trained, parts)), kernel.certificate_key
    )
    details = {"approval": approved.id, "keys": len(units), **receipts.log_details(envelope)}
    with _fulfilling(approved, details, parts) as conn:
        erasures.keep_receipt(conn, approved.id, envelope)


def _destroyed(unit: ErasedUnit, card: DatasetCard, digest: str | None) -> DestroyedKey:
    training = unit.key.object_id == card.object_id
    return DestroyedKey(
        dataset=card.name,
        part=_TRAINING if training else _HELD_OUT,
        fingerprint=card.fingerprint if training else card.holdout_fingerprint,
        unit=unit.key.name,
        key_sha256=digest,
    )


def _drop_checkpoints(datasets: set[str], parts: Parts) -> None:
    """Remove half-trained weights that hold the person without any bound."""
    for job in parts.jobs.jobs():
        private = job.request.get("noise_multiplier") is not None
        if job.request.get("dataset") in datasets and not private:
            checkpoints.drop(job, parts)


def _models(datasets: set[str], parts: Parts) -> Iterator[RemainingModel]:
    """Yield the models that learnt, or may have learnt, from these datasets' training records."""
    for entry in parts.registry.models():
        if entry.kind is ModelKind.ADAPTER and dataset_of(entry) in datasets:
            trained = origin(entry)
            yield RemainingModel(
                name=entry.name,
                dataset=trained.dataset,
                state=str(JobState.DONE),
                digest=entry.digest,
                loss=guarantee(trained, parts),
                certificate_sha256=_certificate(entry.name, parts),
            )
    for job in parts.jobs.jobs():
        unfinished = job.state not in (JobState.DONE, JobState.CANCELLED)
        if unfinished and job.request.get("dataset") in datasets:
            yield RemainingModel(
                name=job.request["output"],
                dataset=job.request["dataset"],
                state=str(job.state),
                digest=None,
                loss=guarantee(of_request(job.id, job.request), parts),
                certificate_sha256=None,
            )
    for asked in invitations.invitations(parts.kernel.store):
        running = asked.state is InvitationState.RUNNING
        if running and asked.manifest.dataset in datasets:
            yield RemainingModel(
                name=asked.manifest.output,
                dataset=asked.manifest.dataset,
                state=str(asked.state),
                digest=None,
                loss=guarantee(of_manifest(asked.manifest), parts),
                certificate_sha256=None,
            )


def _certificate(model: str, parts: Parts) -> str | None:
    """Return the SHA-256 of a model's newest certificate, as the log has it."""
    found = None
    for entry in _entries(parts):
        if entry.fields["resource"] == f"Model::{model}" and entry.fields["action"] == "report":
            found = entry.fields["details"].get(certificates.DIGEST_FIELD, found)
    return found


def _destroy_revived(parts: Parts) -> dict[str, int]:
    """Destroy keys that are there although they were destroyed; count them by approval."""
    with parts.kernel.store.read() as conn:
        approvals = erasures.keys(conn)
    keyring = parts.kernel.vault.keyring
    revived = erasures.revived(keyring, approvals)
    if revived:
        keyring.destroy_units(revived)
    return Counter(approvals[key] for key in revived)


def _fulfilling(
    approved: Approval, details: Mapping[str, Any], parts: Parts
) -> AbstractContextManager[Connection]:
    """Return the transaction in which the approved act's end is recorded."""
    decider = str(approved.decider)
    who = Principal(decider, _name(decider, parts), frozenset())
    kernel = parts.kernel
    return kernel.monitor.fulfil(who, approved.id, Action.ERASE_DATA, kernel.home, details)


def _name(principal_id: str, parts: Parts) -> str:
    """Return the name of someone, also when they were disabled since."""
    query = select(principals.c.name).where(principals.c.id == principal_id)
    with parts.kernel.store.read() as conn:
        return str(conn.execute(query).scalar_one())


def _newest(parts: Parts, action: Action, field: str, value: str) -> int:
    """Return the index of the newest record of an act that has this detail.

    Raises:
        IntegrityError: there is none.
    """
    found = None
    for entry in _entries(parts):
        fields = entry.fields
        if (fields["action"], fields["outcome"]) == (action, Outcome.DONE):
            found = entry.index if fields["details"].get(field) == value else found
    if found is None:
        raise IntegrityError(f"the log has no record of {action} with {field} {value}")
    return found


def _entries(parts: Parts) -> Iterator[LogEntry]:
    after = -1
    while batch := parts.kernel.auditlog.entries(after, _PAGE_OF_LOG):
        yield from batch
        after = batch[-1].index
