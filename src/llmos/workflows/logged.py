"""Entries of this home's log found again by what they say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from llmos.errors import MeasurementError
from llmos.kernel.auditlog import LogEntry
from llmos.reports.evidence import found_at
from llmos.transparency import proofs
from llmos.transparency.proofs import LogProof
from llmos.workflows.parts import Parts

_PAGE: Final = 1000


def details(fields: Mapping[str, object]) -> dict[str, object]:
    """Return values of an entry's details as pointers into the entry."""
    return {f"/details/{name}": value for name, value in fields.items()}


def newest(parts: Parts, wanted: Mapping[str, Mapping[str, object]]) -> dict[str, int]:
    """Return the index of the newest log entry that has all the values wanted at their pointers.

    Raises:
        MeasurementError: there is none.
    """
    found: dict[str, int] = {}
    for logged in entries(parts):
        for name, values in wanted.items():
            if _says(logged.fields, values):
                found[name] = logged.index
    if missing := sorted(set(wanted) - set(found)):
        raise MeasurementError(
            f"the log has no entry of {', '.join(missing)}: there is nothing to rest on",
            hint="train and measure the model in this home",
        )
    return found


def found(parts: Parts, values: Mapping[str, object]) -> Iterator[Mapping[str, Any]]:
    """Return all log entries that have the values wanted at their pointers, in order."""
    return (logged.fields for logged in entries(parts) if _says(logged.fields, values))


def prove(parts: Parts, wanted: Mapping[str, Mapping[str, object]]) -> dict[str, LogProof]:
    """Prove the newest log entries that have the values wanted.

    Raises:
        MeasurementError: there is none for one of the names.
    """
    log = parts.kernel.auditlog
    return {name: proofs.prove(log, index) for name, index in newest(parts, wanted).items()}


def entries(parts: Parts) -> Iterator[LogEntry]:
    """Return all entries in order."""
    after = -1
    while batch := parts.kernel.auditlog.entries(after, _PAGE):
        yield from batch
        after = batch[-1].index


def _says(fields: Mapping[str, Any], values: Mapping[str, object]) -> bool:
    return all(found_at(fields, place) == value for place, value in values.items())
