"""What a site states to its coordinator after a job, with the proofs from this home's log.

Which rounds it trained, from which weights and beside whom, is what its log has of the tasks that
the coordinator signed: each was written there before its training began.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding

from llmos.errors import JobError
from llmos.federations.invitations import Invitation, InvitationState
from llmos.federations.manifest import Manifest
from llmos.federations.statement import (
    Data,
    Record,
    Rounds,
    Spent,
    Statement,
    bits,
    starts_sha256,
)
from llmos.kernel import accounting
from llmos.kernel.pools import Reservation, ReservationState, find_reservation
from llmos.parties.tls import Credentials
from llmos.privacy import PoissonSampledGaussian, mechanism_to_dict
from llmos.reports import evidence, site_part
from llmos.workflows import logged
from llmos.workflows.parts import Parts


def make(job: Invitation, site: str, credentials: Credentials, parts: Parts) -> dict[str, Any]:
    """Return the signed part of a job that has ended here.

    Raises:
        JobError: there is nothing to state: the job had no guarantee, or its hold is not settled.
        MeasurementError: the log has not the entries that the statement rests on.
    """
    kernel, manifest, plan = parts.kernel, job.manifest, job.plan
    with kernel.store.read() as conn:
        reservation = find_reservation(conn, job.id)
    if plan is None or manifest.privacy is None or reservation is None:
        raise JobError(f"{job.id} has charged nothing here")
    spent = _spent(reservation, manifest.privacy.delta, parts)
    card = parts.datasets.card(manifest.dataset)
    done = job.state is InvitationState.DONE
    about = {"/resource": str(card.resource), "/action": "federate"}
    wanted: dict[str, dict[str, object]] = {
        "import": {
            "/resource": str(card.resource),
            "/action": "import-data",
            "/outcome": "done",
            **logged.details({"fingerprint": plan.fingerprint}),
        },
        "admit": about
        | {"/outcome": "admitted"}
        | logged.details({"job": job.id, "manifest_sha256": manifest.digest}),
        "settle": about | {"/outcome": "settled"} | logged.details({"job": job.id}),
        "release": about | {"/outcome": "aborted"} | logged.details({"job": job.id}),
        "publish": about
        | {"/outcome": "done"}
        | logged.details({"job": job.id, "step": "publish"}),
    }
    needed = site_part.needed_records(done=done, spent=spent is not None)
    proofs = logged.prove(parts, {name: wanted[name] for name in sorted(needed)})
    statement = Statement(
        job=job.id,
        manifest_sha256=manifest.digest,
        site=site,
        ended="done" if done else "withdrawn" if _withdrawn(job) else "failed",
        model_sha256=_published(job, parts) if done else None,
        data=Data(
            name=card.name,
            fingerprint=plan.fingerprint,
            classification=str(card.classification),
            units=plan.units,
            unit=card.unit_column,
        ),
        spent=spent,
        rounds=_rounds(manifest, parts),
        vkey=kernel.certificate_key.vkey,
        log_vkey=kernel.auditlog.key.vkey,
        records={
            name: Record.model_validate(pointer)
            for name, pointer in evidence.pointers(proofs).items()
        },
        at=datetime.now(UTC).isoformat(),
    )
    certificate = credentials.certificate.public_bytes(Encoding.PEM).decode()
    return site_part.seal(statement, proofs, kernel.certificate_key, certificate, credentials.key)


def _spent(reservation: Reservation, delta: float, parts: Parts) -> Spent | None:
    """Return what the ledger has of a job; None where it ended before its first step.

    Raises:
        JobError: its hold is not settled.
    """
    if reservation.state is ReservationState.ABORTED:
        return None
    mechanism = reservation.mechanism
    if reservation.state is not ReservationState.COMMITTED:
        raise JobError(f"the budget of {reservation.id} is {reservation.state}, not settled")
    if not isinstance(mechanism, PoissonSampledGaussian):
        raise JobError(f"{reservation.id} was charged for something else than a federated training")
    pools = {pool: parts.kernel.budget.pool(pool) for pool in reservation.costs}
    return Spent(
        steps=mechanism.steps,
        epsilon=accounting.epsilon(mechanism, delta),
        delta=delta,
        mechanism=mechanism_to_dict(mechanism),
        charged={pool: str(amount) for pool, amount in reservation.costs.items()},
        orders={name: int(pool.renyi_order) for name, pool in pools.items()},
    )


def _rounds(manifest: Manifest, parts: Parts) -> Rounds:
    """Return the rounds of a job that this home has trained in, as its log has them."""
    place = {uri: number for number, uri in enumerate(manifest.sites)}
    starts, participants = set[tuple[int, str]](), set[str]()
    wanted = {"/action": "federate", "/outcome": "done"} | logged.details(
        {"job": manifest.id, "step": "round"}
    )
    for entry in logged.found(parts, wanted):
        task = entry["details"]
        starts.add((int(task["round"]), str(task["weights_sha256"])))
        participants |= set(task["participants"])
    return Rounds(
        trained=bits(number for number, _ in starts),
        participants=bits(place[uri] for uri in participants),
        starts_sha256=starts_sha256(starts),
    )


def _withdrawn(job: Invitation) -> bool:
    return job.state is InvitationState.WITHDRAWN


def _published(job: Invitation, parts: Parts) -> str:
    """Return the digest of the adapter that this home published for a job.

    Raises:
        JobError: it is not there any more.
    """
    for entry in parts.registry.models():
        if entry.card.get("job") == job.id:
            return entry.digest
    raise JobError(f"the model of {job.id} is not in this home any more")
