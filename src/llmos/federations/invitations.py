"""The federated jobs that this home is asked for as a site, and what its stewards said to them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final

import rfc8785
from sqlalchemy import Connection, Row, insert, select, update

from llmos.errors import CertificateRefused, JobError, UnknownJob, UpdateRefused
from llmos.federations.manifest import Manifest, SignedManifest, stored
from llmos.federations.tables import coordinators, site_jobs
from llmos.kernel.store import Store, now

_YEAR: Final = timedelta(days=365)


class InvitationState(StrEnum):
    """Where a job stands at a site; only what is approved or admitted by policy ever runs."""

    PROPOSED = "proposed"  # nobody here has said yes
    APPROVED = "approved"  # a steward has
    RUNNING = "running"  # taken up: the ledger holds its cost, or refuses to in a moment
    DONE = "done"
    REFUSED = "refused"
    WITHDRAWN = "withdrawn"  # a steward stopped it while it ran
    FAILED = "failed"


ENDED: Final = frozenset(
    {
        InvitationState.DONE,
        InvitationState.REFUSED,
        InvitationState.WITHDRAWN,
        InvitationState.FAILED,
    }
)


@dataclass(frozen=True, slots=True)
class SitePlan:
    """What this site admits: fixed before, so that every restart charges the same mechanism."""

    fingerprint: str  # of the dataset
    units: int
    noise_multiplier: float | None  # None: without privacy
    epsilon: float | None  # of all rounds, PLD, at the manifest's delta
    admitted_at: str | None = None
    consent: str | None = None  # principal id of the steward by whose approval it was admitted

    @property
    def text(self) -> str:
        """The plan as a row keeps it."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True, slots=True)
class Invitation:
    """One job that a coordinator asks this site for."""

    id: str
    organisation: str
    signed: SignedManifest
    state: InvitationState
    decider: str | None
    reason: str | None
    plan: SitePlan | None  # None: nothing was held for it
    update_round: int | None
    update_object: str | None
    released: tuple[str, ...] | None  # the sites of the sum that shares were given to unmask
    created_at: str
    updated_at: str

    @property
    def manifest(self) -> Manifest:
        """Return what the job runs."""
        return self.signed.manifest


def pin_coordinator(conn: Connection, organisation: str, keys: str) -> None:
    """Keep a coordinator's public keys at the first contact, and insist on them from then on.

    Raises:
        CertificateRefused: they are others than before.
    """
    this = coordinators.c.organisation == organisation
    known = conn.execute(select(coordinators.c["keys"]).where(this)).scalar()
    if known is None:
        conn.execute(insert(coordinators).values(organisation=organisation, keys=keys))
    elif known != keys:
        raise CertificateRefused(
            f"the coordinator of {organisation} signs with other keys than before",
            hint="it may have a new home: leave the federation and join it by a new token",
        )


def forget_coordinator(conn: Connection, organisation: str) -> None:
    """Forget a coordinator's keys, as its membership ends."""
    conn.execute(coordinators.delete().where(coordinators.c.organisation == organisation))


def receive(conn: Connection, signed: SignedManifest, organisation: str) -> None:
    """Store a job that was proposed to this site."""
    at = now()
    conn.execute(
        insert(site_jobs).values(
            id=signed.manifest.id,
            organisation=organisation,
            envelope=rfc8785.dumps(signed.envelope).decode(),
            state=InvitationState.PROPOSED,
            created_at=at,
            updated_at=at,
        )
    )


def change(
    conn: Connection,
    job_id: str,
    *before: InvitationState,
    **values: str | int | None,
) -> None:
    """Change a job that is in one of the states `before`.

    Raises:
        UnknownJob: there is none of this id.
        JobError: it is in another state.
    """
    this = (site_jobs.c.id == job_id) & site_jobs.c.state.in_(before)
    if not conn.execute(update(site_jobs).where(this).values(**values, updated_at=now())).rowcount:
        raise JobError(f"{job_id} is {_read(conn, job_id).state}", hint="`llmos site jobs`")


def begin_round(conn: Connection, job_id: str, number: int) -> None:
    """Insist that a job runs and that a round comes after the one whose update is kept.

    An update that others may have seen is never made again: it would differ in its noise only.

    Raises:
        UnknownJob: there is none of this id.
        JobError: it does not run.
        UpdateRefused: that round, or a later one, was trained before.
    """
    job = _read(conn, job_id)
    if job.state is not InvitationState.RUNNING:
        raise JobError(f"{job_id} is {job.state}", hint="`llmos site jobs`")
    if job.update_round is not None and number <= job.update_round:
        raise UpdateRefused("coordinator", f"round {number} was trained here before")


def release(conn: Connection, job_id: str, number: int, sites: tuple[str, ...]) -> None:
    """Note whose sum of a round this site helps to unmask, before it signs anything.

    Two sums of one round over different sites would give away their difference. What was noted is
    forgotten when the next round's update is kept; from then on the round before is over here.

    Raises:
        UnknownJob: there is none of this id.
        JobError: it does not run.
        UpdateRefused: this round's update is not the one that is kept, or another sum of it was
            unmasked.
    """
    job = _read(conn, job_id)
    if job.update_round != number:
        raise UpdateRefused(
            "coordinator", f"the update of round {number} is not the one that is kept here"
        )
    if job.released is not None and job.released != sites:
        raise UpdateRefused(
            "coordinator", f"round {number} was unmasked for {', '.join(job.released)} before"
        )
    change(conn, job_id, InvitationState.RUNNING, released=json.dumps(list(sites)))


def invitation(store: Store, job_id: str) -> Invitation:
    """Return one job.

    Raises:
        UnknownJob: there is none of this id.
    """
    with store.read() as conn:
        return _read(conn, job_id)


def invitations(store: Store) -> list[Invitation]:
    """Return all jobs, newest first."""
    order = (site_jobs.c.created_at.desc(), site_jobs.c.id)
    with store.read() as conn:
        return [_invitation(row) for row in conn.execute(select(site_jobs).order_by(*order))]


def epsilon_of_year(store: Store, dataset: str, at: datetime, *, besides: str) -> float:
    """Return the sum of the epsilons that federated jobs were admitted with in the year up to `at`.

    Args:
        store: the kernel's.
        dataset: that they were admitted on.
        at: now, or when the job was admitted that is asked about; later ones do not count.
        besides: the id of that job, which does not count either.
    """
    others = site_jobs.c.plan.is_not(None) & (site_jobs.c.id != besides)
    with store.read() as conn:
        jobs = [_invitation(row) for row in conn.execute(select(site_jobs).where(others))]
    return sum(
        job.plan.epsilon or 0.0
        for job in jobs
        if job.plan is not None
        and job.manifest.dataset == dataset
        and at - _YEAR <= datetime.fromisoformat(job.plan.admitted_at or job.created_at) <= at
    )


def facts(job: Invitation) -> dict[str, Any]:
    """Return a job as programs read it."""
    fields: Mapping[str, Any] = job.manifest.model_dump(mode="json")
    return {
        "id": job.id,
        "state": str(job.state),
        "organisation": job.organisation,
        "decider": job.decider,
        "reason": job.reason,
        "plan": None if job.plan is None else asdict(job.plan),
        "created_at": job.created_at,
        "updated_at": job.updated_at,
        "manifest": fields,
        "manifest_sha256": job.manifest.digest,
    }


def _read(conn: Connection, job_id: str) -> Invitation:
    row = conn.execute(select(site_jobs).where(site_jobs.c.id == job_id)).one_or_none()
    if row is None:
        raise UnknownJob(f"no federated job {job_id!r}", hint="`llmos site jobs` lists them")
    return _invitation(row)


def _invitation(row: Row[Any]) -> Invitation:
    fields = row._asdict()
    fields["signed"] = stored(json.loads(fields.pop("envelope")))
    fields["state"] = InvitationState(row.state)
    fields["plan"] = None if row.plan is None else SitePlan(**json.loads(row.plan))
    fields["released"] = None if row.released is None else tuple(json.loads(row.released))
    return Invitation(**fields)
