"""A round at the coordinator: from the signed task of an attempt to the checkpoint of its mean."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

import rfc8785

from llmos.crypto import dsse
from llmos.crypto.notes import decode_base64
from llmos.engines.federated import server_optimizer
from llmos.errors import JobError, StorageError, UnknownParty
from llmos.federations import register
from llmos.federations.manifest import Masked
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.parties import authority, signatures
from llmos.workflows.federated_round import ROUND_TYPE, Attempt, PlainAttempt, Task
from llmos.workflows.federated_state import CHECKPOINT_OBJECT, weights_sha256
from llmos.workflows.masked_round import MaskedAttempt
from llmos.workflows.parts import Parts
from llmos.workflows.running_federation import Running

_MOST_ATTEMPTS: Final = 20


def begin(run: Running, willing: Mapping[str, int], who: Principal, parts: Parts) -> None:
    """Begin an attempt at the present round.

    Args:
        run: the job; its task and attempt are set.
        willing: the sites that take part, with their units.
        who: runs the coordinator.
        parts: of its home.

    Raises:
        JobError: the round was begun too often in vain.
        StorageError, UnknownParty, CertificateRefused: the home, or a site's certificate, cannot be
            used now; nothing was begun.
    """
    manifest = run.job.manifest
    if run.attempts >= _MOST_ATTEMPTS:
        raise JobError(f"round {run.state.round + 1} was begun {run.attempts} times in vain")
    task = Task(
        manifest.id,
        manifest.digest,
        run.state.round,
        run.attempts + 1,
        weights_sha256(run.state),
        dict(sorted(willing.items())),
    )
    key = parts.kernel.certificate_key
    signed = dsse.sign(rfc8785.dumps(task.to_dict()), ROUND_TYPE, key)
    attempt = _attempt(run, task, who, parts)
    # before a site hears of it: a process that comes after this one gives no number twice
    status = run.status() | {"attempt": task.attempt}
    with parts.kernel.store.transaction() as conn:
        register.tell(conn, run.job.id, status)
    run.task, run.attempt, run.attempts, run.told = signed, attempt, task.attempt, status
    run.began = run.phase_began = time.monotonic()
    run.bytes_up = {}


def certified(willing: Mapping[str, int], parts: Parts) -> dict[str, int]:
    """Return those sites that have a valid certificate: who was revoked or is late has none."""
    ca, at, found = authority.load(parts.kernel), datetime.now(UTC), {}
    for site, units in willing.items():
        with suppress(UnknownParty):
            ca.certificates((site,), at)
            found[site] = units
    return found


def _attempt(run: Running, task: Task, who: Principal, parts: Parts) -> Attempt:
    if not isinstance(run.job.manifest.aggregation, Masked):
        return PlainAttempt(task, run.job.manifest)
    ca, at = authority.load(parts.kernel), datetime.now(UTC)
    certificates = ca.certificates(task.participants, at)
    verify = signatures.verifier(certificates, (ca.anchor(who, at),), at)
    return MaskedAttempt(task, run.job.manifest, certificates, verify)


def conclude(run: Running, who: Principal, parts: Parts) -> dict[str, Any] | None:
    """Take the mean of a finished attempt, keep it and record it in one transaction.

    The checkpoint before it is the caller's to delete.

    Returns what is recorded of the round; None while the attempt is not finished.

    Raises:
        StorageError: it could not be kept; the attempt is as it was, and can be concluded later.
        JobError: the job has ended meanwhile.
        EngineError: the mean is none.
    """
    mean = None if run.attempt is None else run.attempt.result()
    if mean is None:
        return None
    before = run.state
    after = server_optimizer.step(run.optimizer, before, mean.update)
    facts: dict[str, Any] = {
        "attempts": run.attempts,
        "sites": list(mean.sites),
        "seconds": round(time.monotonic() - run.began, 3),
        "bytes_up": run.bytes_up,
        "weights_before": weights_sha256(before),
        "weights_after": weights_sha256(after),
        "task_sha256": hashlib.sha256(decode_base64(run.task["payload"])).hexdigest(),
    }
    kernel = parts.kernel
    object_id = kernel.vault.put(CHECKPOINT_OBJECT, server_optimizer.encode(after))
    details = {"job": run.job.id, "round": before.round, **facts}
    try:
        with kernel.monitor.act(who, Action.COORDINATE, kernel.home, details=details) as conn:
            register.keep_round(conn, run.job.id, before.round, object_id, facts)
    except BaseException:
        with suppress(StorageError):
            kernel.vault.delete(object_id)
        raise
    run.job = replace(run.job, rounds_done=before.round + 1, checkpoint=object_id)
    run.state, run.attempt, run.attempts, run.last = after, None, 0, mean.sites
    run.returns, run.shown = {}, ()
    if run.judge is not None:
        run.judge.put(after)
    run.began = time.monotonic()
    return facts
