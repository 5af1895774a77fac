"""Readers of JSON Lines, CSV and Parquet files that refuse every row they cannot vouch for."""

from __future__ import annotations

import csv
import json
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from llmos.data.records import Record, RecordFormat
from llmos.errors import DataError, MalformedRecord

MAX_LINE_BYTES: Final = 2**20
MAX_FIELD_CHARACTERS: Final = 131_072  # the csv module's own limit, kept for every format
PARQUET_BATCH_ROWS: Final = 1024
MISSING: Final = frozenset({"nan", "null", "none"})  # what exports write where a unit is unknown

Row = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of a file become unit, prompt and completion; without a prompt: plain text."""

    unit: str
    completion: str  # in the text format: the column of the text
    prompt: str | None = None

    def __post_init__(self) -> None:
        """Refuse to read one column in two roles."""
        if len(set(self.chosen)) != len(self.chosen):
            raise DataError(
                f"one column has two roles: {', '.join(self.chosen)}",
                hint="unit, prompt and completion must be different columns",
            )

    @property
    def chosen(self) -> tuple[str, ...]:
        """The column names, unit first."""
        return (self.unit, *([self.prompt] if self.prompt is not None else []), self.completion)

    @property
    def format(self) -> RecordFormat:
        """The record format that these columns make."""
        return RecordFormat.TEXT if self.prompt is None else RecordFormat.PROMPT_COMPLETION


def read_rows(path: Path, columns: Columns) -> Iterator[Record]:
    """Yield the file's records; the first bad row ends the iteration with an error.

    A unit may be text or a number. It is stripped and brought to Unicode form NFC, so that one
    person does not become two units by a stray blank or by another spelling of an accent.

    Raises:
        MalformedRecord: a row cannot be read, or its unit or text is null, empty or not a text.
        DataError: unknown suffix, unreadable or empty file, or a chosen column is not there.
    """
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path.name}: unknown kind of file",
            hint=f"give a file that ends in {', '.join(readers)}",
        )
    empty = True
    try:
        for line, row in reader(path, columns):
            empty = False
            yield _record(path.name, line, row, columns)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if empty:
        raise DataError(f"{path.name} holds no records")


def normalized_unit(text: str) -> str:
    """Return the text under which a unit is stored: stripped, and in Unicode form NFC."""
    return unicodedata.normalize("NFC", text.strip())


def _record(source: str, line: int, row: Row, columns: Columns) -> Record:
    """Check one row's values and make the record."""
    for name in columns.chosen:
        if name not in row:
            raise MalformedRecord(source, line, f"there is no {name!r}")
    prompt = columns.prompt
    return Record(
        unit=_unit(source, line, columns.unit, row[columns.unit]),
        prompt="" if prompt is None else _text(source, line, prompt, row[prompt]),
        completion=_text(source, line, columns.completion, row[columns.completion]),
    )


def _unit(source: str, line: int, name: str, value: object) -> str:
    """Return a unit as text: 7, 7.0 and "7 " are the same unit."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise MalformedRecord(source, line, f"unit {name!r} is {kind}, not text or a number")
    if isinstance(value, str):
        unit = normalized_unit(_text(source, line, name, value))
        if unit.lower() in MISSING:
            raise MalformedRecord(source, line, f"unit {name!r} is {unit!r}, a missing value")
        return unit
    if not isinstance(value, int) and not math.isfinite(value):
        raise MalformedRecord(source, line, f"unit {name!r} is not a finite number")
    return str(int(value) if value == int(value) else value)


def _text(source: str, line: int, name: str, value: object) -> str:
    """Return a text unchanged if it can be stored and says something."""
    if not isinstance(value, str):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise MalformedRecord(source, line, f"{name!r} is {kind}, not text")
    if not value.strip():
        raise MalformedRecord(source, line, f"{name!r} is empty")
    if len(value) > MAX_FIELD_CHARACTERS:
        raise MalformedRecord(
            source, line, f"{name!r} is longer than {MAX_FIELD_CHARACTERS} characters"
        )
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate such as "\ud800" is legal JSON but no text
        raise MalformedRecord(source, line, f"{name!r} holds half a character") from None
    return value


def _require(path: Path, present: Sequence[str], columns: Columns) -> None:
    missing = [name for name in columns.chosen if name not in present]
    if missing:
        raise DataError(
            f"{path.name} has no column {', '.join(map(repr, missing))}",
            hint=f"its columns are: {', '.join(map(repr, present)) or 'none'}",
        )
    twice = sorted({name for name in present if present.count(name) > 1})
    if twice:
        raise DataError(f"{path.name} has more than one column {', '.join(map(repr, twice))}")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield numbered lines of UTF-8 text with their line ends; a byte order mark is dropped."""
    with path.open("rb") as source:
        number = 0
        while line := source.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise MalformedRecord(path.name, number, f"longer than {MAX_LINE_BYTES} bytes")
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise MalformedRecord(
                    path.name, number, "not UTF-8", hint="save the file as UTF-8 and try again"
                ) from None


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build a JSON object, refusing a name that stands twice: which value would count?"""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return fields


def _not_a_number(_: str) -> object:
    raise ValueError("NaN and Infinity are not JSON")


def _jsonl_rows(path: Path, columns: Columns) -> Iterator[tuple[int, Row]]:
    """Yield one object a line; blank lines are skipped."""
    first = True
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            fields = json.loads(line, object_pairs_hook=_object, parse_constant=_not_a_number)
        except json.JSONDecodeError as error:
            reason = f"not JSON: {error.msg} at column {error.colno}"
            raise MalformedRecord(path.name, number, reason) from None
        except (ValueError, RecursionError) as error:
            raise MalformedRecord(path.name, number, f"not usable JSON: {error}") from None
        if not isinstance(fields, dict):
            raise MalformedRecord(path.name, number, "not a JSON object")
        if first:
            _require(path, list(fields), columns)
            first = False
        yield number, fields


def _csv_rows(path: Path, columns: Columns) -> Iterator[tuple[int, Row]]:
    """Yield rows under the header of RFC 4180 CSV; a row may span lines inside quotes."""
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise MalformedRecord(path.name, start, f"not CSV: {error}") from None
        if row is None:
            return
        if not row:  # a blank line
            continue
        if header is None:
            header = row
            _require(path, header, columns)
        elif len(row) != len(header):
            raise MalformedRecord(
                path.name, start, f"{len(row)} fields under {len(header)} columns"
            )
        else:
            yield start, dict(zip(header, row, strict=True))


def _parquet_rows(path: Path, columns: Columns) -> Iterator[tuple[int, Row]]:
    """Yield rows batch by batch, reading the chosen columns only; numbers count rows from 1."""
    number = 0
    try:
        with pq.ParquetFile(path) as table:
            _require(path, table.schema_arrow.names, columns)
            _require_plain_types(path, table.schema_arrow, columns)
            for batch in table.iter_batches(
                PARQUET_BATCH_ROWS, columns=list(columns.chosen), use_threads=False
            ):
                for index in range(batch.num_rows):
                    number += 1
                    yield number, {name: batch[name][index].as_py() for name in columns.chosen}
    except UnicodeDecodeError:  # Arrow itself does not check what a file calls text
        if number == 0:
            raise DataError(f"{path.name}: a column's name is not UTF-8") from None
        raise MalformedRecord(path.name, number, "not UTF-8") from None
    except pa.ArrowException as error:
        raise DataError(f"{path.name} is not a readable Parquet file") from error


def _require_plain_types(path: Path, schema: pa.Schema, columns: Columns) -> None:
    for name in columns.chosen:
        kind = schema.field(name).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not any(is_plain(kind) for is_plain in _PLAIN_TYPES):
            raise DataError(
                f"{path.name}: column {name!r} has the type {kind}",
                hint="units must be text or numbers, everything else text",
            )


_PLAIN_TYPES: Final = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal,
    pa.types.is_null,  # every row then fails with its number
)
