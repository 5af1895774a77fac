"""Keys at rest: making, wrapping and deriving them, and files that only their owner can read."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from llmos.errors import TamperedObject, UnsafeKeyFile

KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
_MOST_BYTES: Final = 4096  # of a file with a key


def generate_key() -> bytes:
    """Return 32 random bytes."""
    return secrets.token_bytes(KEY_BYTES)


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
            f"a wrapped key was changed, or does not belong to this root key and name: {aad!r}"
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


def write_private(path: Path, content: bytes) -> None:
    """Make a file that only its owner can read; it and its name are on the disk when this returns.

    Raises:
        FileExistsError: there is a file already; nothing is ever overwritten.
        OSError: it cannot be written; nothing is left behind.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(path.parent)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def read_private(path: Path) -> bytes:
    """Return the first bytes of a file with a key that only its owner can reach.

    Raises:
        UnsafeKeyFile: group or others may read or change the file.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        mode, content = stat.S_IMODE(os.fstat(file.fileno()).st_mode), file.read(_MOST_BYTES)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        message = f"others can reach the key file {path} (mode {mode:04o})"
        raise UnsafeKeyFile(message, hint=f"chmod 600 {path}")
    return content
