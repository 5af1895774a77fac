"""Partners are added by people who may, and cosignatures are checked whenever they are shown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import delete, update
from tests.homes import close, last_records

from llmos import system as systems
from llmos.crypto.notes import Checkpoint, NoteKey, open_note
from llmos.errors import (
    ConfigError,
    PartnerExists,
    PermissionDenied,
    RequestError,
    TamperedLog,
    UnknownPartner,
    VerificationFailed,
)
from llmos.kernel.schema import log_checkpoints, log_cosignatures
from llmos.system import System
from llmos.transparency.cosignatures import cosign, verify_cosignature
from llmos.transparency.proofs import verify_proof
from llmos.workflows import partners
from llmos.workflows.cosign import _keep

BO = NoteKey("llmos.local/b0b0", bytes(range(32)))
CY = NoteKey("llmos.local/cccc", bytes(32))


@pytest.fixture
def made(tmp_path: Path) -> Iterator[System]:
    made = systems.create(tmp_path / "home")
    made.log.add_partner("bo", BO.vkey, url="https://bo.example/witness")
    yield made
    close(made)


def cosigned_by(made: System, name: str, key: NoteKey, time_s: int = 1_700_000_000) -> int:
    """Keep a partner's cosignature of the newest checkpoint and return its size."""
    note = made.kernel.auditlog.checkpoint()
    text = open_note(note, made.kernel.auditlog.key.verifier)
    size = Checkpoint.parse(text).size
    with made.kernel.store.transaction() as conn:
        _keep(conn, size, note, name, cosign(text, key, time_s))
    return size


def grow(made: System, count: int) -> None:
    with made.kernel.store.transaction() as conn:
        made.kernel.auditlog.append_all(conn, [{"n": n} for n in range(count)])


def test_partners_are_listed_and_recorded(made: System) -> None:
    made.log.add_partner("cy", CY.vkey)
    assert [(p.name, p.verifier, p.url) for p in made.log.partners()] == [
        ("bo", BO.verifier, "https://bo.example/witness"),
        ("cy", CY.verifier, None),
    ]
    record = last_records(made, 1)[0]
    assert (record["action"], record["details"]["add"]) == ("manage-partners", "cy")
    assert record["details"]["vkey"] == CY.vkey
    made.log.remove_partner("bo")
    assert [p.name for p in made.log.partners()] == ["cy"]
    with pytest.raises(UnknownPartner, match="no partner 'bo'"):
        made.log.remove_partner("bo")


def test_what_is_no_partner_is_refused(made: System) -> None:
    own = made.kernel.auditlog.key.vkey
    with pytest.raises(ConfigError, match="no witness of itself"):
        made.log.add_partner("me", own)
    with pytest.raises(PartnerExists, match=r"bo .* is a partner already"):
        made.log.add_partner("bo", CY.vkey)
    with pytest.raises(PartnerExists, match=r"bo .* is a partner already"):
        made.log.add_partner("robert", BO.vkey)
    with pytest.raises(VerificationFailed):
        made.log.add_partner("cy", "nonsense")
    for url in ("ftp://cy.example", "cy.example/witness", "https://", "file:///etc"):
        with pytest.raises(ConfigError, match="not an http or https URL"):
            made.log.add_partner("cy", CY.vkey, url=url)
    for name in ("", " ", "a\nb"):
        with pytest.raises(ConfigError, match="not a name"):
            made.log.add_partner(name, CY.vkey)
    assert [p.name for p in made.log.partners()] == ["bo"]


def test_an_auditor_reads_partners_and_does_not_manage_them(made: System) -> None:
    kernel = made.kernel
    made.access.add_user("ida", ["auditor"])
    with_ida = kernel.config.model_copy(update={"principal": "ida"})
    audited = systems.boot(with_ida)
    try:
        assert [p.name for p in audited.log.partners()] == ["bo"]
        assert audited.log.cosigned() == []
        for act in (
            lambda: audited.log.add_partner("cy", CY.vkey),
            lambda: audited.log.remove_partner("bo"),
            audited.log.cosign,
        ):
            with pytest.raises(PermissionDenied):
                act()
    finally:
        close(audited)


def test_cosigned_checkpoints_are_kept_and_shown(made: System) -> None:
    first = cosigned_by(made, "bo", BO)
    grow(made, 5)
    second = cosigned_by(made, "bo", BO, 1_700_000_060)
    made.log.add_partner("cy", CY.vkey)
    shown = [(c.size, c.partner, c.at) for c in made.log.cosigned()]
    assert shown == [
        (second, "bo", "2023-11-14T22:14:20.000Z"),
        (first, "bo", "2023-11-14T22:13:20.000Z"),
    ]
    assert made.log.verify() == second + 1
    made.log.remove_partner("bo")
    assert {c.at for c in made.log.cosigned()} == {partners._FORMER}


def test_a_proof_carries_the_cosignatures_of_the_newest_size_that_has_them(made: System) -> None:
    made.log.add_partner("cy", CY.vkey)
    first = cosigned_by(made, "bo", BO)
    grow(made, 5)
    second = cosigned_by(made, "bo", BO)
    cosigned_by(made, "cy", CY)
    grow(made, 2)
    log_key = made.kernel.auditlog.key.verifier
    for index in range(second):
        proof = partners.prove(index, made.parts)
        assert proof.size == second
        assert verify_proof(proof, log_key)
        text, _, lines = proof.checkpoint_note.partition("\n\n")
        _own, of_bo, of_cy, end = lines.split("\n")
        assert end == ""
        assert verify_cosignature(of_bo, text + "\n", BO.verifier)
        assert verify_cosignature(of_cy, text + "\n", CY.verifier)
    alone = partners.prove(second + 1, made.parts)
    assert alone.size == second + 2
    assert alone.checkpoint_note == made.kernel.auditlog.checkpoint()
    assert first < second
    for index in (-1, second + 2):
        with pytest.raises(RequestError, match="no entry"):
            partners.prove(index, made.parts)


def test_a_cosignature_or_checkpoint_that_was_changed_is_seen(made: System) -> None:
    size = cosigned_by(made, "bo", BO)
    grow(made, 2)
    with made.kernel.store.transaction() as conn:
        other = cosign("other\n", BO, 5)
        conn.execute(update(log_cosignatures).values(line=other))
    with pytest.raises(TamperedLog, match="bo's cosignature of 2 entries"):
        made.log.verify()
    cosigned_by(made, "bo", BO, 2**62)  # a time that no calendar has
    with pytest.raises(TamperedLog, match="bo's cosignature"):
        made.log.verify()
    with made.kernel.store.transaction() as conn:
        conn.execute(delete(log_cosignatures).where(log_cosignatures.c.size != size))
        conn.execute(delete(log_checkpoints).where(log_checkpoints.c.size == size))
    with pytest.raises(TamperedLog, match="bo's cosignature"):
        made.log.verify()
