"""The keyring: a tenant's versioned key between the root key and the keys of objects.

The root key gives a wrapping key (HKDF), that one wraps each version of a tenant's key, and the
newest version wraps the keys of new objects. A rotation (re-keying, NIST SP 800-57 part 1 rev. 5
section 8.2.3.1) makes the next version, wraps every object's key anew and destroys the versions
before. Its stages are `begin`, `rewrap` until nothing is left, and `retire`; a crash between or
inside them leaves every object readable, and running them again finishes what was begun.
"""

from __future__ import annotations

import hmac
from typing import Any, Final

from sqlalchemy import Connection, insert, select, update

from llmos.crypto import keys
from llmos.errors import StorageError, TamperedObject
from llmos.kernel.schema import object_keys, tenant_keys
from llmos.kernel.store import Store, now

TENANT: Final = "default"  # the only one that a home has
_BATCH_OBJECTS: Final = 500  # one transaction: how long a writer waits for a rotation
_LIVE: Final = (tenant_keys.c.tenant == TENANT) & tenant_keys.c.retired_at.is_(None)


class Keyring:
    """Wraps and unwraps the keys of objects; closed to whoever does not have the root key."""

    def __init__(self, store: Store, root_key: bytes) -> None:
        """Derive the wrapping keys; the root key itself is not kept."""
        self.store = store
        self._tenant_kek = keys.derive(root_key, "llmos/vault/tenant-keys/v1")
        self._version_0 = keys.derive(root_key, "llmos/vault/object-keys/v1")

    def wrap(self, conn: Connection, object_id: str, kind: str, key: bytes) -> dict[str, Any]:
        """Return the columns that hold an object's key, wrapped under the newest version."""
        live = _live(conn)
        version = live[-1] if live else self._make(conn, 1)
        context = _context(version, object_id, kind)
        wrapped = keys.wrap(self._tenant_key(conn, version), key, context)
        return {"tenant": TENANT, "key_version": version, "wrapped_key": wrapped}

    def unwrap(self, conn: Connection, object_id: str, kind: str) -> bytes:
        """Return an object's key.

        Raises:
            StorageError: there is no such object, or it was deleted.
            TamperedObject: another root key or kind, a changed row, or a destroyed tenant key.
        """
        columns = select(object_keys.c.key_version, object_keys.c.wrapped_key)
        row = conn.execute(columns.filter_by(object_id=object_id, tenant=TENANT)).first()
        if row is None:
            raise StorageError(
                f"there is no object {object_id}", hint="it was deleted, or keys.db is older"
            )
        version, wrapped = row
        context = _context(version, object_id, kind)
        return keys.unwrap(self._tenant_key(conn, version), wrapped, context)

    def begin(self) -> int:
        """Make the next version, unless a rotation waits to be finished, and return its number."""
        with self.store.transaction() as conn:
            live = _live(conn)
            return live[-1] if len(live) > 1 else self._make(conn, live[-1] + 1 if live else 1)

    def rewrap(self) -> int:
        """Wrap the keys of some objects under the newest version; return how many, 0 at the end.

        Each is read back and compared before any of them is committed.

        Raises:
            TamperedObject: a key does not open, or is not what was written; nothing was changed.
        """
        with self.store.transaction() as conn:
            columns = select(object_keys.c.object_id, object_keys.c.kind)
            old = (object_keys.c.tenant == TENANT) & (object_keys.c.key_version < _live(conn)[-1])
            rows = conn.execute(columns.where(old).limit(_BATCH_OBJECTS)).all()
            for object_id, kind in rows:
                key = self.unwrap(conn, object_id, kind)
                new = self.wrap(conn, object_id, kind, key)
                conn.execute(update(object_keys).filter_by(object_id=object_id).values(new))
                if not hmac.compare_digest(self.unwrap(conn, object_id, kind), key):
                    raise TamperedObject(f"the key of object {object_id} is not what was written")
        return len(rows)

    def retire(self) -> int:
        """Destroy the older versions that no object needs and return how many there were.

        Raises:
            StorageError: someone is reading, so that the old keys are on the disk still; try again.
        """
        used = select(object_keys.c.key_version).where(object_keys.c.tenant == TENANT)
        with self.store.transaction() as conn:
            unused = tenant_keys.c.version.not_in(used) & (tenant_keys.c.version < _live(conn)[-1])
            old = update(tenant_keys).where(_LIVE, unused)
            conn.execute(old.values(wrapped_key=None))
        self.store.checkpoint()  # only what has left the disk counts as retired
        with self.store.transaction() as conn:
            return conn.execute(old.values(retired_at=now())).rowcount

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


def _context(version: int, *names: str) -> bytes:
    """Return what a wrapped key is bound to; version 0 is how it was before there were tenants."""
    return "|".join([*names, TENANT, str(version)] if version else names).encode()
