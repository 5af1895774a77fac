"""What a home holds, as its users see it: without ids, times and the traces of refused acts."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmos.kernel.kernel import Kernel
    from llmos.system import System

_REFUSED = ("failed", "refused")
_DRAWN = ("records", "holdout", "canaries")  # kinds whose content differs from import to import


class Everything:
    """A grant for all objects."""

    def permits(self, object_id: str) -> bool:
        """Permit it."""
        return True


def state(system: System) -> dict[str, Any]:
    """Return all that acts change, in JSON values that are equal in homes with an equal past.

    Every object that has a key is read to its end, and every sealed secret is opened.
    """
    kernel = system.kernel
    size = kernel.auditlog.verify().size
    objects = _objects(kernel)
    return {
        "pools": [[pool.id, pool.cap, pool.spent, pool.held] for pool in kernel.budget.pools()],
        "reservations": sorted(
            [
                pool.id,
                found.mechanism.steps,
                str(found.state),
                found.steps_done,
                found.costs[pool.id],
            ]
            for pool in kernel.budget.pools()
            for found in kernel.budget.reservations(pool.id)
        ),
        "records": [
            [entry.fields.get(name) for name in ("action", "outcome", "number")]
            for entry in kernel.auditlog.entries(limit=size)
            if entry.fields.get("outcome") not in _REFUSED
            and entry.fields.get("details", {}).get("stage") != "begin"  # of a rotation
        ],
        "objects": sorted(objects[object_id] for object_id in _wanted(system, objects)),
        "secrets": _secrets(kernel),
        "datasets": [[card.name, card.units, card.records] for card in system.datasets.cards()],
        "models": [[entry.name, entry.digest] for entry in system.registry.models()],
        "jobs": [
            [job.kind, str(job.state), objects.get(job.checkpoint or "")]
            for job in system.parts.jobs.jobs()
        ],
    }


def _objects(kernel: Kernel) -> dict[str, list[str]]:
    """Read every object; return kind and digest by its id."""
    vault = kernel.vault
    with vault.keyring.store.read() as conn:
        rows = conn.exec_driver_sql("SELECT object_id, kind FROM object_keys").all()
    found = {}
    for object_id, kind in rows:
        plain = vault.read(object_id, kind, Everything())
        found[object_id] = [kind, "" if kind in _DRAWN else hashlib.sha256(plain).hexdigest()]
    return found


def _wanted(system: System, objects: dict[str, list[str]]) -> set[str]:
    """Return the ids of the objects that something refers to, and of those that the acts put.

    A kill between an object's commit and that of its owner leaves one without.
    """
    wanted = {object_id for object_id, (kind, _) in objects.items() if kind == "note"}
    for card in system.datasets.cards():
        wanted |= {card.object_id, card.holdout_object_id, card.canary_object_id}
    wanted |= {model.location for model in system.registry.models() if model.kind == "adapter"}
    return wanted | {job.checkpoint for job in system.parts.jobs.jobs() if job.checkpoint}


def _secrets(kernel: Kernel) -> list[str]:
    with kernel.vault.keyring.store.read() as conn:
        names = conn.exec_driver_sql("SELECT name FROM sealed_secrets").scalars().all()
    return sorted(f"{name} {len(kernel.vault.secret(name))}" for name in names)
