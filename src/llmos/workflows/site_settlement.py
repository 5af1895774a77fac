"""What a federated job costs a site: the charge of all its rounds, and its end in the ledger."""

from __future__ import annotations

from sqlalchemy import Connection

from llmos.data.datasets import DatasetCard
from llmos.engines.dp.plan import DPPlan
from llmos.federations import invitations
from llmos.federations.invitations import Invitation
from llmos.federations.manifest import Manifest
from llmos.kernel.budget import ReservationState
from llmos.kernel.monitor import Charge, Grant
from llmos.kernel.policy import Action
from llmos.kernel.pools import Part, find_reservation
from llmos.workflows.parts import Parts
from llmos.workflows.site_plan import context_of_admission, coordinator_principal, training_plan


def settle(grant: Grant, plan: DPPlan, job_id: str, parts: Parts, *, conn: Connection) -> None:
    """Spend what was run and give back the rest of the hold."""
    if plan.mechanism is None:
        return
    steps = parts.kernel.budget.reservation(job_id).steps_done
    if steps == 0:
        grant.abort(conn=conn)
    else:
        grant.settle(plan.mechanism.after(steps), conn=conn)


def release(job: Invitation, parts: Parts) -> None:
    """Settle a job that ended here before its last round, and delete the update it kept.

    A plan under which nothing was reserved goes too: it counts in no year.

    Raises:
        PermissionDenied: policy no longer lets the coordinator ask for anything; the hold stays.
    """
    kernel, plan = parts.kernel, job.plan
    if plan is None:
        return
    card = parts.datasets.card(job.manifest.dataset)
    dp_plan = training_plan(job.manifest, plan)
    charge = charge_of(job.manifest, card, dp_plan)
    with kernel.store.read() as conn:
        reserved = find_reservation(conn, job.id)
    if charge is not None and reserved is None:
        with kernel.store.transaction() as conn:
            invitations.change(conn, job.id, job.state, plan=None)
    if reserved is not None and reserved.state is ReservationState.HELD:
        with (
            kernel.monitor.admit(
                coordinator_principal(job.manifest),
                Action.FEDERATE,
                card.resource,
                key=job.id,
                objects=(),
                charge=charge,
                context=context_of_admission(job, parts),
                details={"step": "before release"},
            ) as grant,
            kernel.store.transaction() as conn,
        ):
            settle(grant, dp_plan, job.id, parts, conn=conn)
    if job.update_object is not None:
        with kernel.store.transaction() as conn:
            invitations.change(conn, job.id, job.state, update_object=None, update_round=None)
        kernel.vault.delete(job.update_object)


def charge_of(manifest: Manifest, card: DatasetCard, plan: DPPlan) -> Charge | None:
    """Return what a job costs whom at this site; None without privacy."""
    if plan.mechanism is None:
        return None
    part = Part(manifest.purpose, None)
    return Charge(card.name, part, card.fingerprint, card.unit_column, plan.mechanism)
