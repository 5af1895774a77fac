"""An approved erasure: the keys are gone from the disk, a receipt says so, nobody else is hurt."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, select, update
from tests.clinics import PERSON, erased, propose, read, units
from tests.databases import copy_home
from tests.homes import Person, hire, last_records, log_size, opened

import llmos
from llmos.crypto import keys
from llmos.crypto.notes import decode_base64
from llmos.errors import ApprovalConflict, IntegrityError, StorageError, UnknownApproval
from llmos.kernel import root
from llmos.kernel.schema import tenant_keys, unit_keys
from llmos.system import System


@pytest.fixture
def home(clinic_home: Path, tmp_path: Path) -> Path:
    copy_home(clinic_home, tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def bob(home: Path, tmp_path: Path) -> Person:
    return hire(home, "bob", "steward", tmp_path)


def wrapped_keys(system: System, dataset: str) -> dict[str, bytes]:
    card = system.datasets.card(dataset)
    this = (unit_keys.c.object_id == card.object_id) & unit_keys.c.wrapped_key.is_not(None)
    with system.kernel.vault.keyring.store.read() as conn:
        rows = conn.execute(select(unit_keys.c.name, unit_keys.c.wrapped_key).where(this))
        return {str(name): bytes(wrapped) for name, wrapped in rows}


def name_of_person(system: System, dataset: str) -> str:
    return system.kernel.vault.keyring.unit_name(dataset, PERSON)


def everything_on_disk(home: Path) -> bytes:
    return b"\n".join(path.read_bytes() for path in sorted(home.rglob("*")) if path.is_file())


def test_two_people_erase_a_person_from_every_dataset(home: Path, bob: Person) -> None:
    with opened(home) as system:
        whole = {name: read(system, name) for name in ("clinic", "study")}
        assert all(PERSON in units(records) for records in whole.values())
    approval = propose(home)
    with opened(home) as system:
        assert [read(system, name) for name in whole] == list(whole.values()), "only proposed"
    with bob.at_work() as system:
        decided = system.approvals.decide(approval, approve=True)
        assert decided["subject"] == "one person from clinic, study"
        for name, before in whole.items():
            assert read(system, name) == [r for r in before if r.unit != PERSON]
            card = system.datasets.card(name)
            assert (card.units, card.erased_units, card.units_left) == (12, 1, 11)
        for name in ("notes", "ward"):
            assert system.datasets.card(name).erased_units == 0
    receipt = llmos.verify(decided["receipt"])
    assert receipt["erased_from"] == ["clinic, training", "study, training"]
    assert (receipt["proposer"], receipt["decider"]) == ("admin", "bob")
    assert receipt["models"] == []
    assert any("untrained" in sentence for sentence in receipt["not_done"])


@pytest.mark.sqlite("its files")
def test_the_key_is_nowhere_on_the_disk_and_neither_is_the_name(home: Path, bob: Person) -> None:
    with opened(home) as system:
        before = {name: wrapped_keys(system, name) for name in ("clinic", "study")}
        gone = [before[name][name_of_person(system, name)] for name in before]
    assert all(wrapped in everything_on_disk(home) for wrapped in gone)
    erased(home, bob)
    on_disk = everything_on_disk(home)
    for wrapped in gone:
        assert wrapped not in on_disk
        assert wrapped[12:44] not in on_disk, "the key's ciphertext"
    kept = [w for rows in before.values() for w in rows.values() if w not in gone]
    assert len(kept) == 22
    assert all(wrapped in on_disk for wrapped in kept)
    for spelling in (PERSON, PERSON.split()[1], json.dumps(PERSON)):
        assert spelling.encode() not in on_disk


def test_the_root_key_does_not_open_the_record_any_more(home: Path, bob: Person) -> None:
    """With the root key in hand, try every key that keys.db holds on the person's lines."""
    erased(home, bob)
    with opened(home) as system:
        vault, card = system.kernel.vault, system.datasets.card("clinic")
        assert root.unlock(system.kernel.config) is not None

        class Everything:
            def permits(self, object_id: str) -> bool:
                return True

        lines = [
            json.loads(line)
            for line in vault.read(card.object_id, "records", Everything()).splitlines()
        ]
        present = vault.units(card.object_id, Everything())
        person = name_of_person(system, "clinic")
        assert sum(line["unit"] == person for line in lines) == 2, "the ciphertext stays"
        for number, line in enumerate(lines, start=1):
            opened_by = [name for name, key in present.items() if opens(key, line, number)]
            assert opened_by == ([] if line["unit"] == person else [line["unit"]])


def opens(key: bytes, line: dict[str, str], number: int) -> bool:
    try:
        keys.unwrap(key, decode_base64(line["sealed"]), f"clinic|records|{number}".encode())
    except IntegrityError:
        return False
    return True


def test_the_log_says_what_was_destroyed_and_points_to_the_receipt(home: Path, bob: Person) -> None:
    decided = erased(home, bob, "clinic")
    with opened(home) as system:
        size = log_size(system)
        decision, done = last_records(system, 2)
        assert (decision["action"], decision["actor"]) == ("approve", "bob")
        assert (done["action"], done["outcome"], done["actor"]) == ("erase-data", "done", "bob")
        assert done["details"]["approval"] == decided["id"]
        assert done["details"]["policies"] == [decided["id"]]
        assert {u["name"] for u in decision["details"]["request"]["units"]} == {
            name_of_person(system, "clinic")
        }
        receipt = llmos.verify(decided["receipt"])
        assert (receipt["decision_log_index"], receipt["log_index"]) == (size - 2, size - 1)
        destroyed = select(unit_keys.c.destroyed_sha256).where(unit_keys.c.wrapped_key.is_(None))
        with system.kernel.vault.keyring.store.read() as conn:
            assert list(conn.execute(destroyed).scalars()) == receipt["keys_sha256"]
        assert PERSON in units(read(system, "study")), "only clinic was named"


def test_the_receipt_names_each_model_and_what_bounds_it(home: Path, bob: Person) -> None:
    common: dict[str, Any] = {"dataset": "clinic", "model": "tiny", "max_tokens": 32, "steps": 2}
    with opened(home) as system:
        system.train(**common, output="plain", private=False, batch=4)
        trained = system.train(**common, output="private", epsilon=3, batch=12)
        waiting = system.submit(system.plan(**common, output="later", epsilon=1, batch=12))
        assert system.parts.jobs.job(waiting).state == "queued"
    decided = erased(home, bob)
    payload = json.loads(Path(decided["receipt"]).read_bytes())["envelope"]["payload"]
    models = {m["model"]: m for m in json.loads(decode_base64(payload))["predicate"]["models"]}
    assert set(models) == {"plain", "private", "later"}
    assert models["plain"]["guarantee"] is None
    assert "nothing bounds what remains" in models["plain"]["warning"]
    bound = models["private"]["guarantee"]
    assert bound["epsilon"] == pytest.approx(trained["epsilon"])
    assert (bound["delta"], bound["unit"]) == (trained["delta"], "patient_id")
    assert models["later"]["state"] == "queued"
    assert models["later"]["guarantee"]["epsilon"] <= 1
    said = llmos.verify(decided["receipt"])["models"]
    assert any("WARNING" in line for line in said if line.startswith("plain"))


def test_a_key_that_is_gone_without_an_erasure_is_never_skipped(home: Path) -> None:
    with opened(home) as system:
        person = unit_keys.c.name == name_of_person(system, "clinic")
        with system.kernel.vault.keyring.store.transaction() as conn:
            conn.execute(update(unit_keys).where(person).values(wrapped_key=None))
        with pytest.raises(IntegrityError, match="no erasure says so"):
            read(system, "clinic")
        with system.kernel.vault.keyring.store.transaction() as conn:
            conn.execute(delete(unit_keys).where(person))
        with pytest.raises(IntegrityError, match="no erasure says so"):
            read(system, "clinic")


@pytest.mark.sqlite("its file is put back")
def test_a_restored_backup_of_the_keys_brings_nobody_back(home: Path, bob: Person) -> None:
    backup = (home / "keys.db").read_bytes()
    decided = erased(home, bob, "clinic")
    (home / "keys.db").write_bytes(backup)
    for left in ("keys.db-wal", "keys.db-shm"):
        (home / left).unlink(missing_ok=True)
    with opened(home) as system:
        assert PERSON not in units(read(system, "clinic"))
        assert name_of_person(system, "clinic") not in wrapped_keys(system, "clinic")
        record, _ = last_records(system, 2)
        assert record["details"] == {
            "approval": decided["id"], "destroyed_again": 1, "policies": [decided["id"]]
        }  # fmt: skip
        size = log_size(system)
    with opened(home) as system:
        assert log_size(system) == size, "once is enough"
    llmos.verify(decided["receipt"])


def test_a_reader_keeps_the_receipt_waiting_not_the_decision(home: Path, bob: Person) -> None:
    approval = propose(home)
    with opened(home) as reader, reader.kernel.vault.keyring.store.read() as conn:
        conn.execute(select(tenant_keys)).all()  # keeps its snapshot
        with (
            opened(home, api_key_file=bob.key_file, busy_timeout_s=0.2) as system,
            pytest.raises(StorageError, match="reading"),
        ):
            system.approvals.decide(approval, approve=True)
        with pytest.raises(UnknownApproval):
            reader.data.receipt(approval)
    with opened(home) as system:
        assert system.approvals.facts(approval)["state"] == "approved"
        receipt, _ = system.data.receipt(approval)
        assert PERSON not in units(read(system, "clinic"))
    assert llmos.verify(receipt)["approval"] == approval


def test_the_receipt_is_written_again_where_it_is_wanted(
    home: Path, bob: Person, tmp_path: Path
) -> None:
    decided = erased(home, bob)
    with opened(home) as system:
        file, public_keys = system.data.receipt(decided["id"], tmp_path / "out")
        assert llmos.verify(file, keys=public_keys)["approval"] == decided["id"]
        raised = system.budgets.propose_raise("notes", epsilon=50.0, reason="more")
        for wrong in (raised.id, "approval-0"):
            with pytest.raises(UnknownApproval):
                system.data.receipt(wrong)


def test_a_rotation_keeps_the_living_and_does_not_wake_the_erased(home: Path, bob: Person) -> None:
    erased(home, bob, "clinic")
    with opened(home) as system:
        before = read(system, "clinic")
        old = wrapped_keys(system, "clinic")
        done = system.vault.rotate()
        assert done["retired"] == 1
        assert read(system, "clinic") == before
        new = wrapped_keys(system, "clinic")
        assert set(new) == set(old)
        assert not set(new.values()) & set(old.values())
        assert name_of_person(system, "clinic") not in new


def test_two_proposals_for_one_person_erase_once(home: Path, bob: Person) -> None:
    first, second = propose(home), propose(home)
    with bob.at_work() as system:
        system.approvals.decide(first, approve=True)
        with pytest.raises(ApprovalConflict, match=first):
            system.approvals.decide(second, approve=True)
        assert system.approvals.facts(second)["state"] == "open"
        system.approvals.decide(second, approve=False)


KILLER = """
import os, shutil, signal, sys
from pathlib import Path
from sqlalchemy import Engine, event
import llmos
from tests.homes import opened

origin, approval, key_file = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def die_before(moment):
    moments = 0
    def count(*_arguments, **_named):
        nonlocal moments
        moments += 1
        if moments > moment:
            os.kill(os.getpid(), signal.SIGKILL)
    for name in ("before_cursor_execute", "commit"):
        event.listen(Engine, name, count)

stages, moment = [], 0
while True:
    home = origin.with_name(f"copy{moment}")
    shutil.copytree(origin, home)
    child = os.fork()
    if child == 0:
        with opened(home, api_key_file=key_file) as system:
            die_before(moment)
            system.approvals.decide(approval, approve=True)
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    child = os.fork()
    if child == 0:  # the next command finishes what was decided
        with opened(home) as system:
            state = system.approvals.facts(approval)["state"]
            cards = [system.datasets.card(name) for name in ("clinic", "study")]
            lost = {card.erased_units for card in cards}
            system.kernel.auditlog.verify()
            if state == "open":
                os._exit(10 if lost == {0} else 1)
            receipt, _ = system.data.receipt(approval)
            llmos.verify(receipt)
            living = [system.parts.kernel.vault.keyring.store]
            with living[0].read() as conn:
                gone = conn.exec_driver_sql(
                    "SELECT count(*) FROM unit_keys WHERE wrapped_key IS NULL"
                ).scalar()
            done = sum(f["action"] == "erase-data" and f["outcome"] == "done"
                       and "receipt_sha256" in f["details"] for _, f in system.log.read(limit=1000))
            os._exit(20 if (lost, gone, done) == ({1}, 2, 1) else 2)
    stages.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    shutil.rmtree(home)
    if not killed:
        break
    moment += int(sys.argv[4])
print(*stages)
"""


@pytest.mark.slow
@pytest.mark.sqlite("its file is copied between the kills")
def test_a_kill_at_any_moment_leaves_the_person_whole_or_erased_with_a_receipt(
    home: Path, bob: Person
) -> None:
    approval = propose(home)
    run = subprocess.run(
        [sys.executable, "-c", KILLER, str(home), approval, str(bob.key_file), "9"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    stages = [int(stage) for stage in run.stdout.split()]
    assert set(stages) == {10, 20}, run.stderr
    assert stages == sorted(stages), "once decided, always erased"
    assert stages.count(20) > 2, "kills between the decision and the receipt"
