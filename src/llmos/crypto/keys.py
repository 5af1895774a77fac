"""Keys at rest: the root key's providers (key file, passphrase), key wrapping and derivation."""

from __future__ import annotations

import base64
import binascii
import os
import secrets
import stat
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from argon2.low_level import ARGON2_VERSION, Type, hash_secret_raw
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from llmos.errors import (
    HomeExists,
    StorageError,
    TamperedObject,
    UnsafeKeyFile,
    WrongPassphrase,
)

KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
_SALT_BYTES: Final = 16
_KEY_FILE_PREFIX: Final = "llmos-root-key-v1:"  # a secret scanner can find a leaked one by it
_SEALED_AS: Final = b"llmos/root-key/v1"
_LIMITS: Final = {"memory_kib": 4 * 1024 * 1024, "passes": 64, "lanes": 64}


@dataclass(frozen=True, slots=True)
class Argon2Cost:
    """What one guess of a passphrase costs; the default is RFC 9106's second recommended option."""

    memory_kib: int = 64 * 1024
    passes: int = 3
    lanes: int = 4


DEFAULT_COST: Final = Argon2Cost()


def generate_key() -> bytes:
    """Return 32 random bytes."""
    return secrets.token_bytes(KEY_BYTES)


def create_key_file(path: Path) -> bytes:
    """Write a new root key to `path`, readable by its owner only, and return the key.

    The file and its directory entry are on the disk when this returns.

    Raises:
        HomeExists: there is a file already; a root key is never overwritten.
        StorageError: the file cannot be written; nothing is left behind.
    """
    key = generate_key()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise HomeExists(
            f"there is a key file already: {path}",
            hint="a root key is never overwritten; choose another place",
        ) from error
    except OSError as error:
        raise StorageError.of(error, f"the key file {path}") from error
    try:
        with open(descriptor, "w", encoding="ascii") as file:  # noqa: PTH123 - a descriptor
            file.write(f"{_KEY_FILE_PREFIX}{key.hex()}\n")
            file.flush()
            os.fsync(file.fileno())
        sync_directory(path.parent)
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise StorageError.of(error, f"the key file {path}") from error
        raise
    return key


def read_key_file(path: Path) -> bytes:
    """Read the root key that `create_key_file` wrote.

    Raises:
        UnsafeKeyFile: group or others may read or change the file.
        WrongPassphrase: there is no such file, or it is no key file.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read(256)
    except OSError as error:
        raise WrongPassphrase(
            f"the key file cannot be read: {error}",
            hint="name the right one with LLMOS_KEY_FILE or the setting key_file",
        ) from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UnsafeKeyFile(
            f"others can reach the key file {path} (mode {mode:04o})",
            hint=f"chmod 600 {path}",
        )
    prefix = _KEY_FILE_PREFIX.encode()
    try:
        key = binascii.unhexlify(text.removeprefix(prefix).removesuffix(b"\n"))
    except binascii.Error:
        key = b""
    if not text.startswith(prefix) or len(key) != KEY_BYTES:
        raise WrongPassphrase(
            f"{path} is not an LLMOS key file",
            hint="name the right one with LLMOS_KEY_FILE or the setting key_file",
        )
    return key


def seal_with_passphrase(
    root_key: bytes, passphrase: str, cost: Argon2Cost = DEFAULT_COST
) -> dict[str, str | int]:
    """Encrypt a root key under a passphrase (argon2id, RFC 9106; then AES-256-GCM).

    Returns:
        What `open_with_passphrase` needs, as JSON values; only the passphrase is secret.

    Raises:
        WrongPassphrase: the passphrase is empty.
    """
    salt = secrets.token_bytes(_SALT_BYTES)
    kek = _stretch(passphrase, salt, cost)
    return {
        "kdf": "argon2id",
        "memory_kib": cost.memory_kib,
        "passes": cost.passes,
        "lanes": cost.lanes,
        "salt": base64.b64encode(salt).decode(),
        "sealed": base64.b64encode(wrap(kek, root_key, _SEALED_AS)).decode(),
    }


def open_with_passphrase(sealed: Mapping[str, object], passphrase: str) -> bytes:
    """Decrypt a root key that `seal_with_passphrase` sealed.

    Raises:
        WrongPassphrase: this passphrase does not open it.
        TamperedObject: the fields are not what was written.
    """
    salt, wrapped = _base64_field(sealed, "salt"), _base64_field(sealed, "sealed")
    if sealed.get("kdf") != "argon2id" or len(salt) != _SALT_BYTES:
        raise _damaged("kdf or salt")
    cost = Argon2Cost(**{name: _cost_field(sealed, name) for name in _LIMITS})
    if cost.memory_kib < 8 * cost.lanes:  # RFC 9106 section 3.1
        raise _damaged("memory_kib")
    try:
        return unwrap(_stretch(passphrase, salt, cost), wrapped, _SEALED_AS)
    except TamperedObject as error:
        raise WrongPassphrase(
            "the passphrase does not open this home",
            hint="check LLMOS_PASSPHRASE or passphrase_file; there is no way around a lost one",
        ) from error


def wrap(kek: bytes, key: bytes, aad: bytes) -> bytes:
    """Encrypt a key or a short secret under `kek`: nonce 12 | AES-256-GCM ciphertext | tag 16.

    The nonce is random, so one `kek` serves at most 2**32 wraps (NIST SP 800-38D section 8.3).
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + AESGCM(kek).encrypt(nonce, key, aad)


def unwrap(kek: bytes, wrapped: bytes, aad: bytes) -> bytes:
    """Decrypt what `wrap` made.

    Raises:
        TamperedObject: wrong `kek` or `aad`, or changed bytes.
    """
    try:
        return AESGCM(kek).decrypt(wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], aad)
    except (InvalidTag, ValueError) as error:  # ValueError: shorter than a nonce
        raise TamperedObject(
            "a wrapped key was changed, or does not belong to this root key and name"
        ) from error


def derive(key: bytes, label: str) -> bytes:
    """Derive an independent 32-byte key for the purpose `label` (HKDF-SHA256, RFC 5869)."""
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=label.encode()).derive(key)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable, so that a file just made survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def _base64_field(sealed: Mapping[str, object], name: str) -> bytes:
    value = sealed.get(name)
    try:
        return base64.b64decode(value, validate=True) if isinstance(value, str) else b""
    except binascii.Error as error:
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
