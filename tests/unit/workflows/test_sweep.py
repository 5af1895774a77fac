"""What a crash leaves in the vault is swept; what anything names, or is young, stays."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event

import pytest
from sqlalchemy import update
from tests.homes import TRAINING, checked_books, hire, last_records, log_size
from tests.unit.federations.test_registers import SIGNED

from llmos.errors import PermissionDenied, RequestError
from llmos.federations import invitations, register
from llmos.federations.invitations import InvitationState
from llmos.kernel.schema import object_keys
from llmos.kernel.store import timestamp
from llmos.system import System
from llmos.workflows import sweep, training_job

LONG_AGO = datetime.now(UTC) - timedelta(days=3)


def age(system: System) -> None:
    """Let all objects be three days old."""
    with system.kernel.vault._store.transaction() as conn:
        conn.execute(update(object_keys).values(created_at=timestamp(LONG_AGO)))
    for path in system.kernel.config.home.glob("objects/??/*"):
        os.utime(path, (LONG_AGO.timestamp(),) * 2)


def test_only_what_nothing_names_goes(system: System) -> None:
    job = system.submit(system.plan(**TRAINING, checkpoint_every_s=0))
    interrupt = Event()
    with pytest.raises(Exception, match="stopped after step"):
        system.jobs.resume(
            job,
            interrupt=interrupt,
            on_step=lambda view: interrupt.set() if view.step == 3 else None,
        )
    vault, home = system.kernel.vault, system.kernel.config.home
    stray = vault.put("checkpoint", b"of a process that died")
    closed = home / "objects" / "ab" / ("ab" + "0" * 30)  # its key was never committed
    closed.parent.mkdir(exist_ok=True)
    closed.write_bytes(b"nobody can read this")
    assert system.vault.sweep() == {"objects": 0, "files": 0}  # all of them are young
    age(system)
    young = vault.put("checkpoint", b"of a process that lives")
    assert system.vault.sweep() == {"objects": 1, "files": 1}
    record = last_records(system, 1)[0]
    assert (record["action"], record["details"]["act"]) == ("manage-vault", "sweep")
    assert record["details"]["objects"] == [stray]
    vault.delete(young)
    checked_books(system)  # every object is named, and all that are named are there
    assert system.jobs.resume(job)["steps"] == TRAINING["steps"]  # from its checkpoint
    age(system)
    assert system.vault.sweep() == {"objects": 0, "files": 0}
    checked_books(system)


def test_an_adapter_that_is_trained_and_not_published_stays(system: System) -> None:
    """A job between its two steps: only the result of the first one names the adapter."""
    job = system.submit(system.plan(**TRAINING))
    worker = training_job.TrainingJob(system.who, system.parts, Event(), lambda _view: None)

    def dies(*_: object) -> dict[str, object]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        system.parts.jobs.run(job, {"fit": worker.fit, "publish": dies})
    age(system)
    assert system.vault.sweep() == {"objects": 0, "files": 0}
    assert system.jobs.resume(job)["model"] == "notes-private"
    checked_books(system)


def test_young_objects_and_strangers(system: System, home: Path, tmp_path: Path) -> None:
    stray = system.kernel.vault.put("records", b"x")
    size = log_size(system)
    with pytest.raises(RequestError, match="last hour"):
        system.vault.sweep(older_than=timedelta(minutes=59))
    assert log_size(system) == size
    age(system)
    with hire(home, "eve", "engineer", tmp_path).at_work() as theirs:
        with pytest.raises(PermissionDenied):
            theirs.vault.sweep()
        assert sweep.strays(theirs.parts, datetime.now(UTC)) == [stray]


def test_what_a_federated_job_keeps_stays(system: System) -> None:
    """A coordinator's checkpoint, and a site's update that was paid for and not yet delivered."""
    store, vault, job = system.kernel.store, system.kernel.vault, SIGNED.manifest.id
    proposed = InvitationState.PROPOSED
    checkpoint = vault.put("federated-checkpoint", b"weights")
    update_ = vault.put("federated-update", b"an update")
    with store.transaction() as conn:
        register.propose(conn, SIGNED, "admin", None)
        register.keep_round(conn, job, 0, checkpoint, {})
        invitations.receive(conn, SIGNED, "research.example")
        invitations.change(conn, job, proposed, update_round=0, update_object=update_)
    age(system)
    assert system.vault.sweep() == {"objects": 0, "files": 0}
    checked_books(system)
    with store.transaction() as conn:
        invitations.change(conn, job, proposed, update_round=None, update_object=None)
    assert system.vault.sweep() == {"objects": 1, "files": 0}
    assert last_records(system, 1)[0]["details"]["objects"] == [update_]
