"""Providers of the root key: what keeps it when no home is open. A key file or a passphrase.

A provider seals a root key, which gives the JSON fields that root.json keeps, and opens it again
from those fields. `crypto.tokens` is the provider for hardware tokens.
"""

from __future__ import annotations

import base64
import re
import secrets
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from argon2.low_level import ARGON2_VERSION, Type, hash_secret_raw

from llmos.crypto.keys import KEY_BYTES, read_private, unwrap, wrap, write_private
from llmos.errors import HomeExists, TamperedObject, WrongPassphrase

SEALED_AS: Final = b"llmos/root-key/v1"
_SALT_BYTES: Final = 16
_KEY_FILE_PREFIX: Final = "llmos-root-key-v1:"  # a secret scanner can find a leaked one by it
_KEY_FILE: Final = re.compile(rb"%b([0-9a-fA-F]{64})\n?" % _KEY_FILE_PREFIX.encode())
_LIMITS: Final = {"memory_kib": 4 * 1024 * 1024, "passes": 64, "lanes": 64}


class RootKeyProvider(Protocol):
    """One way to keep a root key."""

    def seal(self, root_key: bytes) -> dict[str, Any]:
        """Keep a root key; return what `open` needs, as JSON values that are no secrets."""
        ...

    def open(self, fields: Mapping[str, Any]) -> bytes:
        """Return the root key that `seal` kept."""
        ...


@dataclass(frozen=True, slots=True)
class KeyFile:
    """The root key lies in a file of its own: whoever can read the file has it."""

    path: Path

    def seal(self, root_key: bytes) -> dict[str, Any]:
        """Write the key file, or leave the one that holds this very key.

        Raises:
            HomeExists: there is another file; a root key is never overwritten.
            OSError: the file cannot be written; nothing is left behind.
        """
        text = f"{_KEY_FILE_PREFIX}{root_key.hex()}\n".encode()
        there = self.path.read_bytes() if self.path.exists() else b"nothing"
        if text.startswith(there) and not _KEY_FILE.fullmatch(there):
            self.path.unlink()  # a crash cut it off
        try:
            write_private(self.path, text)
        except FileExistsError as error:
            if not text.startswith(there):
                message = f"there is another key file already: {self.path}"
                raise HomeExists(message, hint="it is never overwritten; name another") from error
        return {"provider": "key-file"}

    def open(self, fields: Mapping[str, Any]) -> bytes:
        """Read the root key that `seal` wrote.

        Raises:
            UnsafeKeyFile: group or others may read or change the file.
            WrongPassphrase: there is no such file, or it is no key file.
        """
        del fields
        hint = "name the right one with LLMOS_KEY_FILE or the setting key_file"
        try:
            text = read_private(self.path)
        except OSError as error:
            raise WrongPassphrase(f"the key file cannot be read: {error}", hint=hint) from error
        key = _KEY_FILE.fullmatch(text)
        if key is None:
            raise WrongPassphrase(f"{self.path} is not an LLMOS key file", hint=hint)
        return bytes.fromhex(key[1].decode())


@dataclass(frozen=True, slots=True)
class Argon2Cost:
    """What one guess of a passphrase costs; the default is RFC 9106's second recommended option."""

    memory_kib: int = 64 * 1024
    passes: int = 3
    lanes: int = 4


DEFAULT_COST: Final = Argon2Cost()


@dataclass(frozen=True, slots=True)
class Passphrase:
    """The root key is encrypted under a passphrase, which nothing keeps."""

    text: str = field(repr=False)
    cost: Argon2Cost = DEFAULT_COST

    def seal(self, root_key: bytes) -> dict[str, Any]:
        """Encrypt a root key (argon2id, RFC 9106; then AES-256-GCM).

        Raises:
            WrongPassphrase: the passphrase is empty.
        """
        salt = secrets.token_bytes(_SALT_BYTES)
        wrapped = wrap(_stretch(self.text, salt, self.cost), root_key, SEALED_AS)
        sealed = {
            "kdf": "argon2id",
            **asdict(self.cost),
            "salt": base64.b64encode(salt).decode(),
            "sealed": base64.b64encode(wrapped).decode(),
        }
        return {"provider": "passphrase", "sealed": sealed}

    def open(self, fields: Mapping[str, Any]) -> bytes:
        """Decrypt a root key that `seal` encrypted.

        Raises:
            WrongPassphrase: this passphrase does not open it.
            TamperedObject: the fields are not what was written.
        """
        sealed = fields["sealed"]
        salt, wrapped = base64_field(sealed, "salt"), base64_field(sealed, "sealed")
        if sealed.get("kdf") != "argon2id" or len(salt) != _SALT_BYTES:
            raise _damaged("kdf or salt")
        cost = Argon2Cost(**{name: _cost_field(sealed, name) for name in _LIMITS})
        if cost.memory_kib < 8 * cost.lanes:  # RFC 9106 section 3.1
            raise _damaged("memory_kib")
        try:
            return unwrap(_stretch(self.text, salt, cost), wrapped, SEALED_AS)
        except TamperedObject as error:
            raise WrongPassphrase(
                "the passphrase does not open this home",
                hint="check LLMOS_PASSPHRASE or passphrase_file; there is no way around a lost one",
            ) from error


def _stretch(passphrase: str, salt: bytes, cost: Argon2Cost) -> bytes:
    """Turn a passphrase into a key; NFC makes every keyboard's "é" the same (RFC 8265)."""
    if not passphrase:
        raise WrongPassphrase("a passphrase must not be empty")
    return hash_secret_raw(
        unicodedata.normalize("NFC", passphrase).encode(),
        salt,
        time_cost=cost.passes,
        memory_cost=cost.memory_kib,
        parallelism=cost.lanes,
        hash_len=KEY_BYTES,
        type=Type.ID,
        version=ARGON2_VERSION,
    )


def base64_field(fields: Mapping[str, object], name: str) -> bytes:
    """Decode one field of root.json.

    Raises:
        TamperedObject: it is missing, or is not base64.
    """
    try:
        return base64.b64decode(str(fields.get(name)), validate=True)
    except ValueError as error:
        raise _damaged(name) from error


def _cost_field(sealed: Mapping[str, object], name: str) -> int:
    """Read one cost within limits, so that a changed file cannot ask for a terabyte."""
    value = sealed.get(name)
    if not isinstance(value, int) or not 1 <= value <= _LIMITS[name]:
        raise _damaged(name)
    return value


def _damaged(field: str) -> TamperedObject:
    return TamperedObject(
        f"the sealed root key is damaged: {field}", hint="restore root.json from a backup"
    )
