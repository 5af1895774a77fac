"""10,000 random flips of one bit: each is detected, or has no effect that anybody could see.

Where a flip goes unnoticed, `UNPROTECTED` and `UNSIGNED` name the column or file, so that a new
one fails here. The generator is seeded: a failure comes again.
"""

from __future__ import annotations

import random  # noqa: TID251 - positions, not secrets
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pytest
from sqlalchemy import select
from tests.faults import whole_home
from tests.homes import opened

from llmos.config import Config
from llmos.crypto.notes import Checkpoint, NoteKey, open_note, sign_note
from llmos.crypto.root_keys import Argon2Cost, Passphrase
from llmos.errors import LlmosError, PolicyError, VerificationFailed
from llmos.kernel import root
from llmos.kernel.policy import DEFAULTS, Policy
from llmos.kernel.schema import KERNEL, KEYS, object_keys
from llmos.reports.verification import verify_bundle, verify_log_proof
from llmos.transparency.cosignatures import cosign, verify_cosignature

pytestmark = pytest.mark.sqlite("bits of its files")

# What a job is doing now and the results of its steps until they are published (then the log has
# them), and times at which something was written. A cosignature under another name is shown as
# that of a former partner, unchecked. A key's last use is written by no act.
UNPROTECTED: Final = frozenset(
    {
        "api_keys.last_used_at",
        "budget_events.at",
        "budget_events.seq",
        "job_steps.at",
        "job_steps.job",
        "job_steps.name",
        "job_steps.result",
        "jobs.attempt",
        "jobs.cancel_requested",
        "jobs.created_at",
        "jobs.result",
        "jobs.updated_at",
        "log_cosignatures.partner",
        "tenant_keys.created_at",
        "tenant_keys.retired_at",
    }
)
Rows = dict[str, list[tuple[Any, ...]]]


@pytest.fixture(scope="module")
def pristine(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the home once; only copies of it are damaged."""
    home = tmp_path_factory.mktemp("flips") / "home"
    whole_home.build(home, tiny_model_folder)
    return home


@pytest.fixture
def home(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path / "home")
    return tmp_path / "home"


def flipped(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Yield `count` copies, each with one bit changed."""
    positions = random.Random(seed)  # noqa: S311
    for _ in range(count):
        bit = positions.randrange(8 * len(data))
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


def rows(path: Path) -> Rows | None:
    """Read all rows, the schema and SQLite's own check without our code; None: SQLite refuses."""
    database = sqlite3.connect(path)
    database.text_factory = bytes
    try:
        names = [name.decode() for (name,) in database.execute("SELECT name FROM sqlite_master")]
        tables = {*names, "sqlite_master"} & {*KERNEL.tables, *KEYS.tables, "sqlite_master"}
        found = {
            name: database.execute(f"SELECT * FROM {name}").fetchall()  # noqa: S608
            for name in tables
        }
        return found | {"check": database.execute("PRAGMA integrity_check").fetchall()}
    except (sqlite3.DatabaseError, UnicodeDecodeError):
        return None
    finally:
        database.close()


def columns_that_differ(path: Path, before: Rows, after: Rows) -> set[str]:
    """Name the columns whose values changed."""
    database = sqlite3.connect(path)
    try:
        names = {
            table: [name for _, name, *_ in database.execute(f"PRAGMA table_info({table})")]
            for table in before.keys() & after.keys() - {"check", "sqlite_master"}
        }
    finally:
        database.close()
    return {
        f"{table}.{name}"
        for table, columns in names.items()
        for old, new in zip(before[table], after[table], strict=False)
        for name, one, other in zip(columns, old, new, strict=True)
        if one != other
    }


def damage(home: Path, name: str, data: bytes) -> None:
    """Put a new file with changed bytes in a file's place, without what SQLite keeps beside it."""
    for old in (name, f"{name}-wal", f"{name}-shm"):
        (home / old).unlink(missing_ok=True)
    (home / name).write_bytes(data)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("name", "count"), [("kernel.db", 3000), ("keys.db", 1500)])
def test_databases(home: Path, name: str, count: int, long: int) -> None:
    data, before, said = (home / name).read_bytes(), rows(home / name), whole_home.said(home)
    assert before is not None
    unnoticed: set[str] = set()
    outcomes = {"no effect": 0, "detected": 0, "unnoticed": 0}
    for changed in flipped(data, count * long, seed=1):
        damage(home, name, changed)
        after = rows(home / name)
        if after == before:
            outcomes["no effect"] += 1
            continue
        try:
            now = whole_home.said(home)
        except LlmosError:
            outcomes["detected"] += 1
            continue
        if now == said:
            outcomes["no effect"] += 1
            continue
        outcomes["unnoticed"] += 1
        assert after is not None
        found = columns_that_differ(home / name, before, after)
        assert found, "something differs that is no row"
        unnoticed |= found
    assert unnoticed <= UNPROTECTED, outcomes
    assert outcomes["detected"] > count * long // 40, outcomes


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["kernel.db", "keys.db"])
def test_every_column_is_protected_but_those_that_are_named(home: Path, name: str) -> None:
    tables = (KERNEL if name == "kernel.db" else KEYS).tables
    said, data, unnoticed = whole_home.said(home), (home / name).read_bytes(), set()
    for table in tables.values():
        for column in table.columns:
            for position in (0, -1):
                damage(home, name, data)
                change_value(home / name, table.name, column.name, position)
                try:
                    if whole_home.said(home) != said:
                        unnoticed.add(f"{table.name}.{column.name}")
                except LlmosError:
                    continue
    expected = {column for column in UNPROTECTED if column.split(".")[0] in tables}
    assert unnoticed == expected - {"jobs.result"}  # at an end of JSON every flip is seen


def change_value(path: Path, table: str, column: str, position: int) -> None:
    """Flip one bit of the newest value of a column, past the triggers that forbid it."""
    database = sqlite3.connect(path)
    try:
        place = "name" if table == "unit_keys" else "rowid"  # that table has no row ids
        newest = f'SELECT {place}, "{column}" FROM {table} WHERE length("{column}") ORDER BY 1 DESC'  # noqa: S608
        if (row := database.execute(newest).fetchone()) is None:
            return
        rowid, value = row
        if isinstance(value, int):
            value ^= 1 << 20
        else:
            changed = bytearray(value if isinstance(value, bytes) else value.encode())
            changed[position] ^= 1
            value = bytes(changed) if isinstance(value, bytes) else changed.decode()
        triggers = "SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND tbl_name = ?"
        guards = database.execute(triggers, [table]).fetchall()
        database.execute("PRAGMA ignore_check_constraints = ON")
        for name, _ in guards:
            database.execute(f"DROP TRIGGER {name}")
        change = f'UPDATE {table} SET "{column}" = ? WHERE {place} = ?'  # noqa: S608
        database.execute(change, [value, rowid])
        for _, text in guards:
            database.execute(text)
        database.commit()
    finally:
        database.close()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["kernel.db", "keys.db"])
def test_write_ahead_logs(pristine: Path, tmp_path: Path, name: str, long: int) -> None:
    """SQLite cuts its log at a frame that was changed: an earlier state comes back, whole.

    Of keys.db that shows at once. An older kernel.db cannot be told from a newer one by itself,
    but a checkpoint that was kept elsewhere, as partners keep it, does not fit it any more.
    """
    live = tmp_path / "live"
    shutil.copytree(pristine, live)
    with opened(live) as system:  # still open: nothing was moved into the files yet
        for number in range(5):
            system.access.add_user(f"person{number}", ["auditor"])
        object_id = system.kernel.vault.put("records", b"record")
        kept = system.kernel.auditlog.checkpoint()
        shutil.copytree(live, tmp_path / "crashed")
    home = tmp_path / "crashed"
    before = {
        file: (home / file).read_bytes()
        for database in ("kernel.db", "keys.db")
        for file in (database, f"{database}-wal")
    }
    outcomes = {"no effect": 0, "detected": 0}
    for changed in flipped(before[f"{name}-wal"], 250 * long, seed=2):
        for database in ("kernel.db", "keys.db"):
            damage(home, database, before[database])
            (home / f"{database}-wal").write_bytes(before[f"{database}-wal"])
        (home / f"{name}-wal").write_bytes(changed)
        try:
            with opened(home) as system:
                system.kernel.auditlog.verify(kept=kept)
                everything = whole_home.Everything()
                assert system.kernel.vault.read(object_id, "records", everything) == b"record"
                assert system.kernel.identity.principal("person4").name == "person4"
            outcomes["no effect"] += 1
        except LlmosError:
            outcomes["detected"] += 1
    assert outcomes["detected"] > 0, outcomes


def accepted(attempts: Iterator[bytes], check: Callable[[bytes], object]) -> int:
    """Count the changed copies that were not refused with an error of ours."""
    count = 0
    for changed in attempts:
        with suppress(LlmosError):
            check(changed)
            count += 1
    return count


def test_ciphertexts(pristine: Path, long: int) -> None:
    path = min((pristine / "objects").glob("??/*"), key=lambda path: path.stat().st_size)
    data, everything = path.read_bytes(), whole_home.Everything()
    with opened(pristine) as system:
        vault = system.kernel.vault
        with vault.keyring.store.read() as conn:
            kind = conn.execute(
                select(object_keys.c.kind).filter_by(object_id=path.name)
            ).scalar_one()
        try:

            def read(changed: bytes) -> None:
                path.write_bytes(changed)
                vault.read(path.name, kind, everything)

            assert not accepted(flipped(data, 1500 * long, 3), read)

            def seek(changed: bytes) -> None:
                path.write_bytes(changed)
                vault.open(path.name, kind, everything).read()

            assert not accepted(flipped(data, 500 * long, 4), seek)
        finally:
            path.write_bytes(data)


def test_certificates_public_keys_and_log_proofs(pristine: Path, tmp_path: Path, long: int) -> None:
    certificate = next((pristine.parent / "report").glob("*.json")).read_bytes()
    public_keys = (pristine / "home.pub").read_bytes()
    with opened(pristine) as system:
        system.log.prove(3, tmp_path / "proof.json")
    proof = (tmp_path / "proof.json").read_bytes()
    verify_bundle(certificate, public_keys.decode())
    verify_log_proof(proof, public_keys.decode())

    def with_keys(changed: bytes) -> None:
        verify_bundle(certificate, text(changed))

    keys = public_keys.decode()
    count = 1000 * long
    assert not accepted(flipped(certificate, count, 5), lambda file: verify_bundle(file, keys))
    said = verify_log_proof(proof, keys)

    def without_effect(changed: bytes) -> None:
        """The partner's line in the proof is for whoever has the partner's key."""
        if verify_log_proof(changed, keys) == said:
            raise VerificationFailed("nothing else is said than before")

    assert not accepted(flipped(proof, count, 6), without_effect)
    assert not accepted(flipped(public_keys.rstrip(), count // 4, 7), with_keys)


def text(data: bytes) -> str:
    """Decode a file as `llmos verify` does."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise VerificationFailed("this is not text") from error


def test_checkpoints_and_cosignatures(long: int) -> None:
    key, witness = NoteKey("log", bytes(32)), NoteKey("witness", bytes(range(32)))
    head = Checkpoint("log", 7, bytes(range(32))).text()
    note, line = sign_note(head, key).encode(), cosign(head, witness, 1_700_000_000).encode()
    assert open_note(note.decode(), key.verifier) == head
    assert verify_cosignature(line.decode(), head, witness.verifier) == 1_700_000_000
    count = 500 * long

    def read_note(changed: bytes) -> None:
        open_note(text(changed), key.verifier)

    def read_line(changed: bytes) -> None:
        verify_cosignature(text(changed), head, witness.verifier)

    assert not accepted(flipped(note, count, 8), read_note)
    assert not accepted(flipped(line.rstrip(), count, 9), read_line)


def test_root_json_and_the_key_file(tmp_path: Path, long: int) -> None:
    config, root_key = Config(home=tmp_path, key_file=tmp_path / "root.key"), bytes(range(32))
    count = 250 * long
    for provider in (root.key_file(config), Passphrase("word", Argon2Cost(8, 1, 1))):
        root.write(tmp_path, provider, root_key)
        data = (tmp_path / "root.json").read_bytes()
        for changed in flipped(data, count, 10):
            (tmp_path / "root.json").write_bytes(changed)
            try:
                assert root.unlock(config, passphrase="word") == root_key
            except LlmosError:
                continue
        (tmp_path / "root.json").write_bytes(data)
        assert root.unlock(config, passphrase="word") == root_key


def test_policies(tmp_path: Path, long: int) -> None:
    """A policy is a file for people to change, so a flip may make another policy, never a fault.

    Whatever loads has another digest; what does not load denies everything.
    """
    for file in DEFAULTS.iterdir():
        shutil.copy(file, tmp_path)
    before = Policy.load(tmp_path).digest
    for file in sorted(tmp_path.glob("*.cedar")):  # the schema is the code's, not the file's
        data = file.read_bytes()
        for changed in flipped(data, 150 * long, 11):
            file.write_bytes(changed)
            try:
                assert Policy.load(tmp_path).digest != before
            except PolicyError:
                continue
        file.write_bytes(data)
