"""One-time codes from a clock: TOTP (RFC 6238) with what authenticator apps expect by default."""

from __future__ import annotations

import base64
import hmac
import secrets
import struct
from typing import Final
from urllib.parse import quote, urlencode

STEP_S: Final = 30
DIGITS: Final = 6
SEED_BYTES: Final = 20  # RFC 4226 section 4, R6: 160 bits are recommended
_SKEW_STEPS: Final = 1  # RFC 6238 section 5.2: at most one step for delay and clocks


def new_seed() -> bytes:
    """Return 20 random bytes."""
    return secrets.token_bytes(SEED_BYTES)


def code(seed: bytes, step: int, digits: int = DIGITS) -> str:
    """Return the code of a time step (RFC 4226 section 5.3).

    HMAC-SHA1 is what the apps know; it does not rest on SHA-1's resistance to collisions.
    """
    digest = hmac.digest(seed, struct.pack(">Q", step), "sha1")
    offset = digest[-1] & 0x0F
    number = int.from_bytes(digest[offset : offset + 4], "big") & 0x7FFFFFFF
    return str(number % 10**digits).zfill(digits)


def matching_step(seed: bytes, given: str, at_s: float, *, after: int) -> int | None:
    """Return the time step whose code was given, or None.

    Args:
        seed: that of the person.
        given: what they typed.
        at_s: the present, in seconds since 1970.
        after: the newest step that was used; none up to it counts again.
    """
    now = int(at_s // STEP_S)
    typed, found = given.strip().encode(errors="replace"), None
    for step in range(now - _SKEW_STEPS, now + _SKEW_STEPS + 1):
        if hmac.compare_digest(code(seed, step).encode(), typed) and step > after:
            found = step
    return found


def uri(seed: bytes, name: str, issuer: str) -> str:
    """Return the `otpauth` URI that authenticator apps read, as text or as a QR code."""
    secret = base64.b32encode(seed).decode().rstrip("=")
    fields = urlencode({"secret": secret, "issuer": issuer})
    return f"otpauth://totp/{quote(f'{issuer}:{name}')}?{fields}"
