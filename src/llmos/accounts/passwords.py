"""Passwords: argon2id with RFC 9106's second recommended option, lengths of NIST SP 800-63B-4."""

from __future__ import annotations

import unicodedata
from typing import Final

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from argon2.profiles import RFC_9106_LOW_MEMORY

from llmos.errors import RequestError

MIN_LENGTH: Final = 15  # SP 800-63B-4 section 3.1.1: for a password that is used alone
MAX_LENGTH: Final = 1024
_MIN_DISTINCT: Final = 6
_HASHER: Final = PasswordHasher.from_parameters(RFC_9106_LOW_MEMORY)
# Of 32 random bytes that nobody kept: to check a password against it takes as long as any check.
_NOBODYS: Final = (
    "$argon2id$v=19$m=65536,t=3,p=4$euf8PXOtKnX93zv9jiKdLA"
    "$FikIFo0XRi1yolielEDCFv53Enq4f3Oo6mi36sZP6ns"
)


def hash_password(name: str, password: str) -> str:
    """Return the hash (PHC string format) of a new password.

    Raises:
        RequestError: it is too short or too long, has too few different characters, or holds the
            person's name.
    """
    text = _normalized(password)
    if not MIN_LENGTH <= len(text) <= MAX_LENGTH:
        raise RequestError(f"a password has {MIN_LENGTH} to {MAX_LENGTH} characters")
    if len(set(text)) < _MIN_DISTINCT or name.casefold() in text.casefold():
        raise RequestError(
            f"a password has at least {_MIN_DISTINCT} different characters and not the user's name"
        )
    return _HASHER.hash(text)


def verify(password_hash: str | None, password: str) -> bool:
    """Tell whether a password is that of the hash; without a hash do the same work and say no."""
    try:
        right = _HASHER.verify(password_hash or _NOBODYS, _normalized(password)[:MAX_LENGTH])
    except (VerificationError, InvalidHashError):
        return False
    return right and password_hash is not None


def _normalized(password: str) -> str:
    """Make every keyboard's "é" the same (RFC 8265 section 4.2); drop what is no character."""
    return unicodedata.normalize("NFC", password).encode(errors="replace").decode()
