"""Keys of single units: wrapped like objects' keys, rotated with them, destroyed one by one."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import func, insert, select, update

from llmos.errors import PermissionDenied, StorageError, TamperedObject
from llmos.kernel import keyring
from llmos.kernel.keyring import KeyName
from llmos.kernel.schema import KEYS, object_keys, sealed_secrets, unit_keys
from llmos.kernel.store import Store
from llmos.kernel.vault import Vault

ROOT_KEY = bytes(range(32))


class Everything:
    """A grant for all objects."""

    def permits(self, object_id: str) -> bool:
        return True


class Nothing:
    """A grant for no object."""

    def permits(self, object_id: str) -> bool:
        return False


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(tmp_path / "keys.db", KEYS, busy_timeout_s=0.2)
    yield opened
    opened.close()


@pytest.fixture
def vault(tmp_path: Path, store: Store) -> Vault:
    return Vault(tmp_path, store, ROOT_KEY)


def some_units(vault: Vault, count: int = 5) -> dict[str, bytes]:
    names = [vault.keyring.unit_name("ward", f"person {n}") for n in range(count)]
    return {name: secrets.token_bytes(32) for name in names}


def wrapped(store: Store, object_id: str) -> dict[str, bytes]:
    this = (unit_keys.c.object_id == object_id) & unit_keys.c.wrapped_key.is_not(None)
    with store.read() as conn:
        rows = conn.execute(select(unit_keys.c.name, unit_keys.c.wrapped_key).where(this))
        return {str(name): bytes(found) for name, found in rows}


def on_disk(home: Path) -> bytes:
    return b"".join(path.read_bytes() for path in home.glob("keys.db*"))


def test_an_object_comes_with_the_keys_of_its_units(vault: Vault, store: Store) -> None:
    units, others = some_units(vault), {"ab" * 16: secrets.token_bytes(32)}
    object_id, other = vault.put("records", b"a", units), vault.put("records", b"b", others)
    assert vault.units(object_id, Everything()) == units
    assert vault.units(other, Everything()) == others
    assert vault.units(vault.put("records", b"c"), Everything()) == {}
    with pytest.raises(PermissionDenied):
        vault.units(object_id, Nothing())
    vault.delete(object_id)
    assert vault.units(object_id, Everything()) == {}
    assert vault.units(other, Everything()) == others


def test_a_units_name_is_a_keyed_hash_and_another_one_in_each_dataset(
    vault: Vault, tmp_path: Path, store: Store
) -> None:
    name = vault.keyring.unit_name("ward", "person")
    assert (len(name), int(name, 16) >= 0) == (32, True)
    assert name == Vault(tmp_path, store, ROOT_KEY).keyring.unit_name("ward", "person")
    others = {
        vault.keyring.unit_name("war", "dperson"),
        vault.keyring.unit_name("clinic", "person"),
        vault.keyring.unit_name("ward", "persons"),
        Vault(tmp_path, store, bytes(32)).keyring.unit_name("ward", "person"),
    }
    assert len(others | {name}) == 5


def test_a_rotation_covers_units_in_batches_and_skips_destroyed_ones(
    vault: Vault, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "_BATCH_KEYS", 2)
    units = some_units(vault)
    object_id = vault.put("records", b"a", units)
    again = vault.put("holdout", b"b", units)  # the same names in another object
    before = wrapped(store, object_id)
    gone = min(units)
    vault.keyring.destroy_units([KeyName(object_id, gone)])
    vault.keyring.begin()
    batches = list(iter(vault.keyring.rewrap, 0))
    assert (sum(batches), max(batches)) == (2 + 4 + 5, 2)
    assert vault.keyring.retire() == 1
    assert vault.units(object_id, Everything()) == {n: k for n, k in units.items() if n != gone}
    assert vault.units(again, Everything()) == units
    for old in before.values():
        assert old not in on_disk(tmp_path)
    assert vault.read(object_id, "records", Everything()) == b"a"


def test_an_old_version_stays_while_a_unit_needs_it(vault: Vault, store: Store) -> None:
    vault.put("records", b"a", some_units(vault))
    vault.keyring.begin()
    assert vault.keyring.rewrap() == 1, "the object's own key"
    assert vault.keyring.retire() == 0
    assert vault.keyring.rewrap() == 5
    assert vault.keyring.retire() == 1


def test_a_unit_key_is_bound_to_object_and_unit_and_is_no_objects_key(
    vault: Vault, store: Store
) -> None:
    units = some_units(vault, 2)
    object_id = vault.put("records", b"a", units)
    other = vault.put("records", b"b", units)
    first, second = sorted(units)
    whole = wrapped(store, object_id)
    with store.read() as conn:
        own = conn.execute(
            select(object_keys.c.wrapped_key).where(object_keys.c.object_id == object_id)
        ).scalar_one()
    this = (unit_keys.c.object_id == object_id) & (unit_keys.c.name == first)
    for wrong in (whole[second], wrapped(store, other)[first], own, bytes(60)):
        with store.transaction() as conn:
            conn.execute(update(unit_keys).where(this).values(wrapped_key=wrong))
        with pytest.raises(TamperedObject):
            vault.units(object_id, Everything())
    with store.transaction() as conn:
        conn.execute(update(unit_keys).where(this).values(wrapped_key=whole[first]))
    assert vault.units(object_id, Everything()) == units


def test_a_destroyed_key_is_nowhere_on_the_disk_and_the_others_are(
    vault: Vault, store: Store, tmp_path: Path
) -> None:
    """Enough rows that SQLite moves some from page to page, and free pages of rows before."""
    units = some_units(vault, 2000)
    object_id = vault.put("records", b"a", units)
    with store.transaction() as conn:  # rows in between, so that pages split in the middle
        row = conn.execute(select(unit_keys)).mappings().first()
        assert row is not None
        for _ in range(2000):
            new = {"name": secrets.token_hex(16), "wrapped_key": secrets.token_bytes(60)}
            conn.execute(insert(unit_keys).values(dict(row) | new))
        conn.execute(insert(sealed_secrets).values(name="large", sealed=bytes(1_000_000)))
    with store.transaction() as conn:
        conn.execute(sealed_secrets.delete())
    store.checkpoint()
    size = (tmp_path / "keys.db").stat().st_size
    before = wrapped(store, object_id)
    gone = sorted(units)[::100]
    for name in gone:
        assert before[name] in on_disk(tmp_path)
    digests = vault.keyring.destroy_units(KeyName(object_id, name) for name in gone)
    assert digests == {
        KeyName(object_id, name): hashlib.sha256(before[name]).hexdigest() for name in gone
    }
    bytes_now = on_disk(tmp_path)
    for name in gone:
        assert before[name] not in bytes_now
        assert before[name][12:] not in bytes_now
    assert all(before[name] in bytes_now for name in sorted(units)[1::100])
    assert (tmp_path / "keys.db-wal").stat().st_size == 0
    assert (tmp_path / "keys.db").stat().st_size < size - 900_000, "it was written anew"
    assert not set(gone) & set(wrapped(store, object_id))


def test_destroying_again_gives_the_same_answer_and_an_unknown_key_none(
    vault: Vault, store: Store
) -> None:
    units = some_units(vault)
    object_id = vault.put("records", b"a", units)
    first = KeyName(object_id, min(units))
    nobody = KeyName(object_id, "00" * 16)
    done = vault.keyring.destroy_units([first, nobody])
    assert done[nobody] is None
    assert vault.keyring.destroy_units([first, nobody]) == done
    assert len(vault.units(object_id, Everything())) == 4


def test_while_someone_reads_a_key_counts_as_not_destroyed(vault: Vault, store: Store) -> None:
    object_id = vault.put("records", b"a", units := some_units(vault))
    first = KeyName(object_id, min(units))
    with store.read() as conn:
        conn.execute(select(unit_keys)).all()
        with pytest.raises(StorageError):
            vault.keyring.destroy_units([first])
    assert vault.keyring.destroy_units([first])[first] is not None


def test_a_database_is_written_anew_after_reading_and_keeps_its_rows(
    store: Store, tmp_path: Path
) -> None:
    with store.transaction() as conn:
        rows = [{"name": f"s{n}", "sealed": secrets.token_bytes(4000)} for n in range(50)]
        conn.execute(insert(sealed_secrets), rows)
    store.checkpoint()
    large = (tmp_path / "keys.db").stat().st_size
    with store.transaction() as conn:
        conn.execute(sealed_secrets.delete().where(sealed_secrets.c.name != "s7"))
    with store.read() as conn:  # the pooled connection is read-only now
        assert conn.execute(select(func.count()).select_from(sealed_secrets)).scalar() == 1
    store.compact()
    assert (tmp_path / "keys.db").stat().st_size < large / 3
    with store.transaction() as conn:
        assert conn.execute(select(sealed_secrets.c.name)).scalar_one() == "s7"
