"""A home with rows in every table, and all that it can say through its typed readers."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import select
from tests.homes import close, opened, write_notes

import llmos
from llmos.crypto import merkle
from llmos.crypto.notes import Checkpoint, NoteKey, open_note, sign_note
from llmos.jobs.tables import job_steps
from llmos.kernel.policy import Action
from llmos.kernel.schema import budget_events, object_keys
from llmos.transparency.cosignatures import cosign
from llmos.transparency.tables import witnessed
from llmos.workflows import cosign as cosigning
from llmos.workflows import partners
from llmos.workflows.witness import Witness

if TYPE_CHECKING:
    from llmos.system import System

PARTNER: Final = NoteKey("llmos.local/partner", bytes(range(1, 33)))


def build(home: Path, model: Path) -> None:
    """Make a home in which every table has rows: a trained, measured and certified adapter too."""
    system = llmos.create(home, device="cpu", threads=1)
    try:
        _import_and_train(system, model)
        _people(system)
        _witnesses(system)
    finally:
        close(system)


def _import_and_train(system: System, model: Path) -> None:
    system.pull(str(model), name="tiny")
    system.import_data(
        write_notes(system.kernel.config.home.parent / "notes.jsonl"),
        unit="patient_id",
        text="text",
        classification="sensitive",
        purposes=("training", "care"),
        purpose_epsilons={"training": 7.0},
        epsilon=8,
        delta=1e-5,
        holdout=0.4,
        canaries=100,
    )
    batch = system.datasets.card("notes").units
    job: dict[str, Any] = {
        "dataset": "notes",
        "model": "tiny",
        "epsilon": 3.0,
        "batch": batch,
        "max_tokens": 32,
    }
    system.train(**job, steps=3, output="adapted")
    system.measure("adapted")
    system.report("adapted", folder=system.kernel.config.home.parent / "report")
    system.submit(system.plan(**job, steps=1, output="waiting"))


def _people(system: System) -> None:
    system.access.add_user("bob", ["administrator", "steward"])
    system.access.create_key(label="ward 7", models=["tiny"], days=30)
    system.access.revoke_key(system.access.create_key(user="bob", label="old").id)
    system.budgets.propose_raise("notes", epsilon=9, reason="a second study")
    token = system.kernel.config.home.parent / "bob.key"
    token.touch(mode=0o600)
    token.write_text(system.access.create_key(user="bob").token)
    with opened(system.kernel.config.home, api_key_file=token) as bobs:
        bobs.approvals.decide(system.approvals.overview()[0]["id"], approve=True)
    system.budgets.propose_raise("notes", epsilon=10, reason="a third study")
    system.vault.rotate()


def _witnesses(system: System) -> None:
    """Let a partner cosign this log, and cosign the partner's."""
    kernel, parts, who = system.kernel, system.parts, system.who
    partners.add("partner", PARTNER.vkey, "https://partner.example", who, parts)
    here = kernel.home
    note = kernel.auditlog.checkpoint()
    text = open_note(note, kernel.auditlog.key.verifier)
    with kernel.monitor.act(who, Action.MANAGE_PARTNERS, here) as conn:
        size = Checkpoint.parse(text).size
        cosigning._keep(conn, size, note, "partner", cosign(text, PARTNER, 1_700_000_000))
    theirs = Checkpoint(PARTNER.name, 1, merkle.leaf_hash(b"{}"))
    witness = Witness(kernel.store, kernel.monitor, kernel.auditlog.key, here)
    witness.add_checkpoint(who, 0, (), sign_note(theirs.text(), PARTNER))


class Everything:
    """A grant for all objects."""

    def permits(self, object_id: str) -> bool:
        return True


def said(home: Path) -> dict[str, Any]:
    """Open a home and return all that it says about itself; whatever is wrong is raised."""
    with opened(home) as system:
        kernel, parts = system.kernel, system.parts
        system.log.verify()
        with kernel.store.read() as conn:
            unread = [
                conn.execute(select(table)).all() for table in (job_steps, witnessed, budget_events)
            ]
        with kernel.vault._store.read() as conn:
            stored = conn.execute(select(object_keys.c.object_id, object_keys.c.kind)).all()
        everything = {
            "keys": kernel.public_keys,
            "principals": [kernel.identity.principal(p.name) for p in kernel.identity.principals()],
            "api_keys": system.access.keys(),
            "datasets": system.datasets.cards(),
            "models": system.registry.models(),
            "pools": kernel.budget.pools(),
            "recomputed": [kernel.budget.recompute(pool.id) for pool in kernel.budget.pools()],
            "reservations": [kernel.budget.reservations(p.id) for p in kernel.budget.pools()],
            "approvals": system.approvals.overview(),
            "jobs": parts.jobs.jobs(),
            "partners": partners.partners(kernel.store),
            "cosigned": partners.cosigned(parts),
            "versions": system.vault.versions(),
            "log": kernel.auditlog.entries(limit=10_000),
            "unread": unread,
            "objects": {
                object_id: hashlib.sha256(kernel.vault.read(object_id, kind, Everything())).digest()
                for object_id, kind in stored
            },
        }
    return everything
