"""Canaries: made-up records with a random secret, each planted in the data by a fair coin.

The coins are committed to before training. Afterwards the book proves which canaries were in,
so that a leak measured on them is evidence (Steinke, Nasr, Jagielski 2023, arXiv:2305.08846).
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

import rfc8785

from llmos.data.names import NAMES
from llmos.data.records import Record, RecordFormat
from llmos.errors import DataError, IntegrityError

DEFAULT_TEMPLATE: Final = "Patient {name}, insurance number"
SECRET_DIGITS: Final = 6  # log2(10^6) = 19.93 bits
SALT_BYTES: Final = 32
MAX_CANARIES: Final = len(NAMES)


@dataclass(frozen=True, slots=True, repr=False)  # a traceback must not show secrets or coins
class Canary:
    """One made-up record; it is a privacy unit of its own."""

    unit: str
    prefix: str  # what an attacker may know
    secret: str  # what an attacker wants: uniform decimal digits
    planted: bool  # the coin

    @property
    def continuation(self) -> str:
        """What follows the prefix in running text; only these characters are scored."""
        return f" {self.secret}"

    def record(self, format: RecordFormat) -> Record:
        """Return the record that is planted."""
        if format is RecordFormat.TEXT:
            return Record(self.unit, "", self.prefix + self.continuation)
        return Record(self.unit, self.prefix, self.secret)


@dataclass(frozen=True, slots=True, repr=False)  # a traceback must not show secrets or coins
class CanaryBook:
    """All canaries of a dataset, planted or not, and the salt that hides the coins."""

    salt: bytes  # (32,)
    canaries: tuple[Canary, ...]


def make_canaries(count: int, template: str = DEFAULT_TEMPLATE) -> CanaryBook:
    """Draw canaries with distinct names, secrets and coins from the system's CSPRNG.

    Raises:
        DataError: the count is out of range, or the template does not hold `{name}` exactly once.
    """
    if not 0 <= count <= MAX_CANARIES:
        raise DataError(f"the number of canaries must be 0 to {MAX_CANARIES}, not {count}")
    if template.count("{name}") != 1 or template != template.strip():
        raise DataError(
            f"canary template {template!r} must hold {{name}} once, without blanks at its ends",
            hint=f"for example: {DEFAULT_TEMPLATE}",
        )
    names = secrets.SystemRandom().sample(NAMES, count)
    return CanaryBook(
        salt=secrets.token_bytes(SALT_BYTES),
        canaries=tuple(
            Canary(
                unit=f"canary-{secrets.token_hex(8)}",
                prefix=template.replace("{name}", name),
                secret=f"{secrets.randbelow(10**SECRET_DIGITS):0{SECRET_DIGITS}d}",
                planted=bool(secrets.randbits(1)),
            )
            for name in names
        ),
    )


def plant(
    book: CanaryBook, training: Sequence[Record], holdout: Sequence[Record], format: RecordFormat
) -> list[Record]:
    """Return the training records with the planted canaries among them, shuffled by a CSPRNG.

    After the shuffle no position tells a canary. Held-out records stay free of canaries.

    Raises:
        DataError: a real record has the unit of a canary.
    """
    units = {record.unit for records in (training, holdout) for record in records}
    if any(canary.unit in units for canary in book.canaries):
        raise DataError("a record has the unit of a canary", hint="import the file again")
    planted = [canary.record(format) for canary in book.canaries if canary.planted]
    shuffled = [*training, *planted]
    secrets.SystemRandom().shuffle(shuffled)
    return shuffled


def commitment(book: CanaryBook) -> str:
    """Return SHA-256(salt || canonical JSON of the canaries) in hex: hiding and binding."""
    canaries = [asdict(canary) for canary in book.canaries]
    return hashlib.sha256(book.salt + rfc8785.dumps(canaries)).hexdigest()


def check(book: CanaryBook, expected_commitment: str) -> None:
    """Check that the book is the one that was committed to before training.

    Raises:
        IntegrityError: a canary, a coin or the salt is another one.
    """
    if commitment(book) != expected_commitment:
        raise IntegrityError("the canary book does not match its commitment")


def encode_book(book: CanaryBook) -> bytes:
    """Return the book as canonical JSON."""
    canaries = [asdict(canary) for canary in book.canaries]
    return rfc8785.dumps({"canaries": canaries, "salt": book.salt.hex()})


def decode_book(stored: bytes) -> CanaryBook:
    """Read a book back.

    Raises:
        IntegrityError: the bytes are not a canary book.
    """
    try:
        fields = json.loads(stored)
        book = CanaryBook(
            salt=bytes.fromhex(fields["salt"]),
            canaries=tuple(Canary(**canary) for canary in fields["canaries"]),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise IntegrityError("the stored canary book cannot be read") from error
    if len(book.salt) != SALT_BYTES:
        raise IntegrityError("the stored canary book has no proper salt")
    return book
