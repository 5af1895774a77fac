"""Records of a dataset as canonical JSON (RFC 8785), and how older homes stored them.

Until units had keys of their own, the stored form was one such object a line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import BinaryIO

import rfc8785

from llmos.errors import IntegrityError


class RecordFormat(StrEnum):
    """What a record holds: one running text, or a prompt and the completion to be learnt."""

    TEXT = "text"
    PROMPT_COMPLETION = "prompt-completion"


@dataclass(frozen=True, slots=True, repr=False)  # a traceback must not show someone's data
class Record:
    """One training example and the privacy unit that it belongs to."""

    unit: str  # value of the unit column; all records of one unit are protected together
    prompt: str  # empty in the text format
    completion: str  # in the text format: the whole text


def encode_record(record: Record) -> bytes:
    """Return a record as canonical JSON; equal records give equal bytes."""
    fields = {"completion": record.completion, "prompt": record.prompt, "unit": record.unit}
    return rfc8785.dumps(fields)


def fingerprint(stored: bytes) -> str:
    """Return the SHA-256 of the stored form in hex; the budget pool is tied to it."""
    return hashlib.sha256(stored).hexdigest()


def decode_records(stored: BinaryIO, expected_fingerprint: str) -> Iterator[Record]:
    """Yield the records of the older stored form line by line.

    Raises:
        IntegrityError: a line is not in the stored form, or after the last line the fingerprint
            differs; whoever needs all records therefore has none without the check.
    """
    digest = hashlib.sha256()
    for number, line in enumerate(stored, start=1):
        digest.update(line)
        yield decode_record(line, number)
    if digest.hexdigest() != expected_fingerprint:
        raise IntegrityError("stored records differ from the fingerprint in the catalogue")


def decode_record(line: bytes, number: int) -> Record:
    """Read what `encode_record` wrote.

    Raises:
        IntegrityError: it is not that.
    """
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise IntegrityError(f"stored record {number} is not JSON") from error
    if (
        not isinstance(fields, dict)
        or set(fields) != {"unit", "prompt", "completion"}
        or not all(isinstance(value, str) for value in fields.values())
    ):
        raise IntegrityError(f"stored record {number} lacks its three texts")
    return Record(fields["unit"], fields["prompt"], fields["completion"])
