"""The vault: encrypted objects on disk, each under a key of its own, and a few sealed secrets.

An object of personal records comes with a key for each unit, committed and deleted with its own.

Life of an object: a fresh key and id; the ciphertext is written beside its place, flushed, renamed
and its directory flushed; then the wrapped key is committed, and from then on the object exists. A
crash before that leaves at most a file that nothing can decrypt; `sweep` removes it. Deleting
destroys the key first, then the file, so that ciphertext in any copy of the folder stays closed.
"""

from __future__ import annotations

import io
import os
import re
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from sqlalchemy import Select, delete, insert, select

from llmos.crypto import encryption, keys
from llmos.errors import PermissionDenied, StorageError, TamperedObject
from llmos.kernel.keyring import KeyName, Keyring
from llmos.kernel.schema import object_keys, sealed_secrets, unit_keys
from llmos.kernel.store import Store, now

_OBJECT_ID: Final = re.compile(r"[0-9a-f]{32}")
_KIND: Final = re.compile(r"[a-z][a-z0-9-]*")
_PARTIAL: Final = ".part"


class ObjectGrant(Protocol):
    """The right to open certain objects; the monitor hands it out."""

    def permits(self, object_id: str) -> bool:
        """Tell whether the holder may open this object now."""
        ...


class Vault:
    """Objects and secrets of one home, closed to whoever does not have the root key."""

    def __init__(self, home: Path, keys_store: Store, root_key: bytes) -> None:
        """Derive the wrapping keys; the root key itself is not kept."""
        self._objects = home / "objects"
        self._store = keys_store
        self.keyring = Keyring(keys_store, root_key)
        self._secret_kek = keys.derive(root_key, "llmos/vault/secrets/v1")

    def seal_secret(self, name: str, secret: bytes) -> None:
        """Store a secret under a name that is not in use; a secret is never overwritten.

        Raises:
            StorageError: there is a secret of this name.
        """
        sealed = keys.wrap(self._secret_kek, secret, name.encode())
        with self._store.transaction() as conn:
            if conn.execute(_sealed(name)).first() is not None:
                raise StorageError(f"there is a secret {name!r} already")
            conn.execute(insert(sealed_secrets).values(name=name, sealed=sealed))

    def secret(self, name: str) -> bytes:
        """Return a sealed secret.

        Raises:
            StorageError: there is no secret of this name.
            TamperedObject: it was changed, renamed, or sealed under another root key.
        """
        with self._store.read() as conn:
            sealed = conn.execute(_sealed(name)).scalar_one_or_none()
        if sealed is None:
            raise StorageError(f"there is no secret {name!r}", hint="restore keys.db")
        return keys.unwrap(self._secret_kek, sealed, name.encode())

    def destroy_secret(self, name: str) -> None:
        """Destroy a sealed secret, also in the write-ahead log; none of this name is no error."""
        with self._store.transaction() as conn:
            conn.execute(delete(sealed_secrets).where(sealed_secrets.c.name == name))
        self._store.checkpoint()

    def put(
        self, kind: str, source: BinaryIO | bytes, units: Mapping[str, bytes] | None = None
    ) -> str:
        """Encrypt `source` to its end into a new object and return the object's id.

        Args:
            kind: what the object is.
            source: read to its end.
            units: the keys under which records inside of it are sealed, by the units' names.

        Raises:
            StorageFull: no room; nothing of the object is left behind.
            StorageError: the home cannot be written; nothing of the object is left behind.
            ValueError: the kind is no lower-case word.
        """
        if not _KIND.fullmatch(kind):
            raise ValueError(f"not a kind of object: {kind!r}")
        object_id = secrets.token_hex(16)
        key, context = keys.generate_key(), _context(object_id, kind)
        path = self._path(object_id)
        stream = io.BytesIO(source) if isinstance(source, bytes) else source
        try:
            self._write(path, stream, key, context)
            with self._store.transaction() as conn:
                own = self.keyring.wrap(conn, object_keys, {KeyName(object_id, kind): key})
                conn.execute(insert(object_keys).values(created_at=now()), own)
                if units:  # neighbours in the table are written in a run
                    named = {KeyName(object_id, name): units[name] for name in sorted(units)}
                    conn.execute(insert(unit_keys), self.keyring.wrap(conn, unit_keys, named))
        except BaseException as error:
            for leftover in (_partial(path), path):
                leftover.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise StorageError.of(error, f"a new {kind} object") from error
            raise
        return object_id

    def open(self, object_id: str, kind: str, grant: ObjectGrant) -> BinaryIO:
        """Open an object as a seekable stream that decrypts what is read from it.

        Raises:
            PermissionDenied: the grant does not cover this object.
            StorageError: there is no such object, or it was deleted.
            TamperedObject: it was changed or cut, or is of another kind; reads raise this too.
        """
        key, context = self._key(object_id, kind, grant)
        file = self._ciphertext(object_id)
        try:
            reader = encryption.DecryptingReader(key, file, context)
        except TamperedObject:
            file.close()
            raise
        return io.BufferedReader(reader, encryption.BUFFER_BYTES)

    def read(self, object_id: str, kind: str, grant: ObjectGrant) -> bytes:
        """Return the whole plaintext of an object.

        Raises:
            PermissionDenied: the grant does not cover this object.
            StorageError: there is no such object, or it was deleted.
            TamperedObject: it was changed or cut, or is of another kind.
        """
        key, context = self._key(object_id, kind, grant)
        plain = io.BytesIO()
        with self._ciphertext(object_id) as file:
            encryption.decrypt(key, file, plain, context=context)
        return plain.getvalue()

    def units(self, object_id: str, grant: ObjectGrant) -> dict[str, bytes]:
        """Return the keys of an object's units by name, without those that were destroyed.

        Raises:
            PermissionDenied: the grant does not cover this object.
            TamperedObject: a key was changed.
        """
        _require(grant, object_id)
        with self._store.read() as conn:
            found = self.keyring.unwrap(conn, unit_keys, object_id)
        return {unit.name: key for unit, key in found.items()}

    def delete(self, object_id: str) -> None:
        """Destroy an object's keys, also in the write-ahead log, and then remove its file.

        Deleting again finishes a deletion that was interrupted.

        Raises:
            StorageError: the key or the file could not be erased from the disk yet; delete again.
            ValueError: this is no object id.
        """
        path = self._path(object_id)
        with self._store.transaction() as conn:
            for table in (unit_keys, object_keys):
                conn.execute(delete(table).where(table.c.object_id == object_id))
        self._store.checkpoint()
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError.of(error, f"the file of the deleted object {object_id}") from error

    def sweep(self, *, older_than_s: float = 86_400.0) -> int:
        """Remove files that have no key, left by a crash, and return how many there were.

        Young files are spared: another process may be about to commit their keys.
        """
        newest = time.time() - older_than_s
        with self._store.read() as conn:
            known = set(conn.execute(select(object_keys.c.object_id)).scalars())
        removed = 0
        for path in self._objects.glob("??/*"):
            with suppress(FileNotFoundError):  # another process removed it
                if path.name not in known and path.stat().st_mtime < newest:
                    path.unlink()
                    removed += 1
        return removed

    def _write(self, path: Path, source: BinaryIO, key: bytes, context: bytes) -> None:
        """Encrypt to `path` so that it is there whole and durable, or not at all."""
        if not path.parent.exists():
            self._objects.mkdir(mode=0o700, exist_ok=True)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            keys.sync_directory(self._objects)
        partial = _partial(path)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            encryption.encrypt(key, source, file, context=context)
            os.fsync(descriptor)
        partial.rename(path)
        keys.sync_directory(path.parent)

    def _key(self, object_id: str, kind: str, grant: ObjectGrant) -> tuple[bytes, bytes]:
        """Return an object's key and encryption context to a holder of a grant for it."""
        _require(grant, object_id)
        with self._store.read() as conn:
            found = self.keyring.unwrap(conn, object_keys, object_id)
        if not found:
            raise StorageError(
                f"there is no object {object_id}", hint="it was deleted, or keys.db is older"
            )
        return found.popitem()[1], _context(object_id, kind)

    def _ciphertext(self, object_id: str) -> BinaryIO:
        path = self._path(object_id)
        try:
            return path.open("rb", buffering=0)
        except FileNotFoundError as error:
            raise TamperedObject(
                f"the file of object {object_id} is gone", hint="restore objects/ from a backup"
            ) from error
        except OSError as error:
            raise StorageError.of(error, f"object {object_id}") from error

    def _path(self, object_id: str) -> Path:
        if not _OBJECT_ID.fullmatch(object_id):
            raise ValueError(f"not an object id: {object_id!r}")
        return self._objects / object_id[:2] / object_id


def _require(grant: ObjectGrant, object_id: str) -> None:
    if not grant.permits(object_id):
        raise PermissionDenied("this grant", "open", f"object {object_id}")


def _partial(path: Path) -> Path:
    return path.with_name(path.name + _PARTIAL)


def _context(object_id: str, kind: str) -> bytes:
    """Return what binds a ciphertext to this object and kind, so that none can be swapped."""
    return f"{object_id}|{kind}".encode()


def _sealed(name: str) -> Select[bytes]:
    return select(sealed_secrets.c.sealed).where(sealed_secrets.c.name == name)
