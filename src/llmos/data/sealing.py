"""The stored form of personal records: each line sealed under the key of its own unit.

A line is canonical JSON (RFC 8785) with the unit's name among the keys, which is a keyed hash, and
the record under AES-256-GCM, bound to the dataset, the part of it and its place there. Without the
key a line can be read by nobody; what stays is that there is one, and how long it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import BinaryIO

from llmos.crypto import keys
from llmos.crypto.notes import decode_base64, encode_base64
from llmos.data.records import Record, decode_record, encode_record
from llmos.errors import IntegrityError, TamperedObject, VerificationFailed


def seal_records(
    records: Sequence[Record], place: str, name_of: Callable[[str], str]
) -> tuple[bytes, dict[str, bytes]]:
    """Return the stored form of records, and the new keys of their units by name.

    Args:
        records: in the order in which they are stored.
        place: the dataset and the part of it.
        name_of: gives a unit's name among the keys.
    """
    names: dict[str, str] = {}
    unit_keys: dict[str, bytes] = {}
    lines = []
    for number, record in enumerate(records, start=1):
        if record.unit not in names:
            names[record.unit] = name_of(record.unit)
            unit_keys[names[record.unit]] = keys.generate_key()
        name = names[record.unit]
        sealed = keys.wrap(unit_keys[name], encode_record(record), _context(place, number))
        lines.append(f'{{"sealed":"{encode_base64(sealed)}","unit":"{name}"}}\n'.encode())
    return b"".join(lines), unit_keys


def open_records(
    stored: BinaryIO,
    expected_fingerprint: str,
    place: str,
    unit_keys: Mapping[str, bytes],
    erased: Collection[str],
) -> Iterator[Record]:
    """Yield the records of the units that were not erased.

    Raises:
        IntegrityError: a line is not in the stored form, the key of a unit is gone that was not
            erased, or after the last line the fingerprint differs.
        TamperedObject: a record does not belong to its unit or its place.
    """
    digest = hashlib.sha256()
    for number, line in enumerate(stored, start=1):
        digest.update(line)
        name, sealed = _read_line(line, number)
        if name in erased:
            continue
        if name not in unit_keys:
            raise IntegrityError(
                f"the key of stored record {number} is gone, and no erasure says so",
                hint="restore keys.db from a backup",
            )
        try:
            plain = keys.unwrap(unit_keys[name], sealed, _context(place, number))
        except TamperedObject as error:
            raise TamperedObject(
                f"stored record {number} does not belong to its unit and its place"
            ) from error
        yield decode_record(plain, number)
    if digest.hexdigest() != expected_fingerprint:
        raise IntegrityError("stored records differ from the fingerprint in the catalogue")


def _read_line(line: bytes, number: int) -> tuple[str, bytes]:
    try:
        match json.loads(line):
            case {"sealed": str(sealed), "unit": str(name), **rest} if not rest:
                return name, decode_base64(sealed)
    except (ValueError, VerificationFailed) as error:
        raise IntegrityError(f"stored record {number} cannot be read") from error
    raise IntegrityError(f"stored record {number} is not a sealed one")


def _context(place: str, number: int) -> bytes:
    return f"{place}|{number}".encode()
