"""The keyring: a tenant's versioned key between the root key and the keys of objects.

The root key gives a wrapping key (HKDF), that one wraps each version of a tenant's key, and the
newest version wraps the keys of new objects. A rotation (re-keying, NIST SP 800-57 part 1 rev. 5
section 8.2.3.1) makes the next version, wraps every object's key anew and destroys the versions
before. Its stages are `begin`, `rewrap` until nothing is left, and `retire`; a crash between or
inside them leaves every object readable, and running them again finishes what was begun.

Inside an object the records of a unit may be sealed under a key of that unit's own. It is wrapped
the same way and named by a keyed hash; destroying it erases the unit and nobody else.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import Column, Connection, Select, Table, and_, bindparam, insert, select, update

from llmos.crypto import keys
from llmos.errors import TamperedObject
from llmos.kernel.schema import object_keys, tenant_keys, unit_keys
from llmos.kernel.store import Store, now

TENANT: Final = "default"  # the only one that a home has
_BATCH_KEYS: Final = 500  # one transaction: how long a writer waits for a rotation
_LIVE: Final = (tenant_keys.c.tenant == TENANT) & tenant_keys.c.retired_at.is_(None)
_UNIT_NAME_DIGITS: Final = 32  # 128 bits


class KeyName(NamedTuple):
    """A key in `object_keys` or `unit_keys`: the object that it belongs to, and a second name."""

    object_id: str
    name: str  # the object's kind, or the keyed hash of a unit


Keys = dict[KeyName, bytes]


class Keyring:
    """Wraps and unwraps the keys of objects; closed to whoever does not have the root key."""

    def __init__(self, store: Store, root_key: bytes) -> None:
        """Derive the wrapping keys; the root key itself is not kept."""
        self.store = store
        self._tenant_kek = keys.derive(root_key, "llmos/vault/tenant-keys/v1")
        self._version_0 = keys.derive(root_key, "llmos/vault/object-keys/v1")
        self._unit_names = keys.derive(root_key, "llmos/vault/unit-names/v1")

    def unit_name(self, dataset: str, unit: str) -> str:
        """Return a unit's name among the keys: a keyed hash, another one in each dataset."""
        tag = hmac.new(self._unit_names, f"{dataset}\0{unit}".encode(), "sha256")
        return tag.hexdigest()[:_UNIT_NAME_DIGITS]

    def wrap(self, conn: Connection, table: Table, opened: Keys) -> list[dict[str, Any]]:
        """Return the rows of `table` that hold these keys, wrapped under the newest version."""
        live = _live(conn)
        version = live[-1] if live else self._make(conn, 1)
        kek, rows = self._tenant_key(conn, version), []
        columns = ("object_id", _named(table).name, "key_version", "wrapped_key")
        for which, key in opened.items():
            wrapped_key = keys.wrap(kek, key, _context(version, *_names(table, which)))
            row = zip(columns, (*which, version, wrapped_key), strict=True)
            rows.append({"tenant": TENANT, **dict(row)})
        return rows

    def unwrap(self, conn: Connection, table: Table, object_id: str) -> Keys:
        """Return the keys of an object in `table`; those that were destroyed are left out.

        Raises:
            TamperedObject: another root key, a changed row, or a destroyed tenant key.
        """
        rows = _wrapped(table).where(table.c.object_id == object_id)
        return self._unwrap(conn, table, conn.execute(rows).all())

    def destroy_units(self, units: Iterable[KeyName]) -> dict[KeyName, str | None]:
        """Destroy keys of units for good; doing it again finishes what was interrupted.

        What is left of a key is the SHA-256 (hex) of its wrapped form, which is returned; None
        where there never was one. The database is then written anew, because SQLite may have left
        copies of the row where it lay before.

        Raises:
            StorageError: someone is reading, so that the keys are on the disk still; try again.
        """
        digests: dict[KeyName, str | None] = {}
        with self.store.transaction() as conn:
            for unit in units:
                row = conn.execute(select(unit_keys).filter_by(**unit._asdict())).first()
                digests[unit] = None if row is None else row.destroyed_sha256
                if row is not None and row.wrapped_key is not None:
                    digests[unit] = hashlib.sha256(row.wrapped_key).hexdigest()
                    gone = update(unit_keys).filter_by(**unit._asdict())
                    conn.execute(gone.values(wrapped_key=None, destroyed_sha256=digests[unit]))
        self.store.compact()
        return digests

    def begin(self) -> int:
        """Make the next version, unless a rotation waits to be finished, and return its number."""
        with self.store.transaction() as conn:
            live = _live(conn)
            return live[-1] if len(live) > 1 else self._make(conn, live[-1] + 1 if live else 1)

    def rewrap(self) -> int:
        """Wrap some keys under the newest version and return how many, 0 when none is left.

        Each is read back and compared before any of them is committed.

        Raises:
            TamperedObject: a key does not open, or is not what was written; nothing was changed.
        """
        with self.store.transaction() as conn:
            return self._rewrap(conn, object_keys) or self._rewrap(conn, unit_keys)

    def retire(self) -> int:
        """Destroy the older versions that no object needs and return how many there were.

        Raises:
            StorageError: someone is reading, so that the old keys are on the disk still; try again.
        """
        older = tenant_keys.c.version
        with self.store.transaction() as conn:
            unused = older < _live(conn)[-1]
            for table in (object_keys, unit_keys):
                unused &= older.not_in(_wrapped(table).with_only_columns(table.c.key_version))
            old = update(tenant_keys).where(_LIVE, unused)
            conn.execute(old.values(wrapped_key=None))
        self.store.checkpoint()  # only what has left the disk counts as retired
        with self.store.transaction() as conn:
            return conn.execute(old.values(retired_at=now())).rowcount

    def _rewrap(self, conn: Connection, table: Table) -> int:
        old = _wrapped(table).where(table.c.key_version < _live(conn)[-1]).limit(_BATCH_KEYS)
        if opened := self._unwrap(conn, table, conn.execute(old).all()):
            which = (table.c.object_id, _named(table))
            this = and_(*(column == bindparam(f"this_{column.name}") for column in which))
            new = self.wrap(conn, table, opened)
            rows = [{**row, **{f"this_{c.name}": row[c.name] for c in which}} for row in new]
            conn.execute(update(table).where(this), rows)
            names = zip(which, zip(*opened, strict=True), strict=True)
            written = _wrapped(table).where(*(column.in_(set(found)) for column, found in names))
            if not opened.items() <= self._unwrap(conn, table, conn.execute(written)).items():
                raise TamperedObject("the wrapped keys are not what was written")
        return len(opened)

    def _unwrap(self, conn: Connection, table: Table, rows: Iterable[Sequence[Any]]) -> Keys:
        keks: dict[int, bytes] = {}
        opened = {}
        for object_id, name, version, wrapped_key in rows:
            if version not in keks:
                keks[version] = self._tenant_key(conn, version)
            which = KeyName(object_id, name)
            context = _context(version, *_names(table, which))
            opened[which] = keys.unwrap(keks[version], wrapped_key, context)
        return opened

    def _make(self, conn: Connection, version: int) -> int:
        wrapped = keys.wrap(self._tenant_kek, keys.generate_key(), _context(version))
        row = {"tenant": TENANT, "version": version, "wrapped_key": wrapped, "created_at": now()}
        conn.execute(insert(tenant_keys).values(row))
        return version

    def _tenant_key(self, conn: Connection, version: int) -> bytes:
        if version == 0:
            return self._version_0
        wrapped = select(tenant_keys.c.wrapped_key).filter_by(tenant=TENANT, version=version)
        found = conn.execute(wrapped).scalar() or b""
        return keys.unwrap(self._tenant_kek, found, _context(version))


def _live(conn: Connection) -> list[int]:
    """Return the versions that were not retired, oldest first."""
    live = select(tenant_keys.c.version).where(_LIVE).order_by(tenant_keys.c.version)
    return list(conn.execute(live).scalars())


def _wrapped(table: Table) -> Select[*tuple[Any, ...]]:
    """Select the tenant's keys, but for destroyed ones: both names, version and wrapped key."""
    columns = (table.c.object_id, _named(table), table.c.key_version, table.c.wrapped_key)
    return select(*columns).where(table.c.tenant == TENANT, table.c.wrapped_key.is_not(None))


def _named(table: Table) -> Column[str]:
    """Return the column of the second name."""
    return table.c.kind if table is object_keys else table.c.name


def _names(table: Table, which: KeyName) -> tuple[str, ...]:
    """Return what a key is bound to; no kind has a bar, so no unit's key opens as an object's."""
    return which if table is object_keys else (which.object_id, "unit", which.name)


def _context(version: int, *names: str) -> bytes:
    """Return what a wrapped key is bound to; version 0 is how it was before there were tenants."""
    return "|".join([*names, TENANT, str(version)] if version else names).encode()
