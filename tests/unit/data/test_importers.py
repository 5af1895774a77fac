from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmos.data.importers import MAX_FIELD_CHARACTERS, MAX_LINE_BYTES, Columns, read_rows
from llmos.data.records import Record, RecordFormat
from llmos.errors import DataError, MalformedRecord

TEXT = Columns(unit="patient", completion="text")
PAIR = Columns(unit="patient", prompt="note", completion="code")
Table = list[dict[str, str]]

# What survives each format unchanged: no surrogates, no lone carriage return in an unquoted field.
CELL = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff"), min_size=1
)
SAID = CELL.filter(lambda text: text.strip() != "")
UNIT = st.from_regex(r"[A-Za-z0-9]{1,8}", fullmatch=True).filter(
    lambda unit: unit.lower() not in {"nan", "null", "none"}
)
ROWS = st.lists(
    st.fixed_dictionaries({"patient": UNIT, "note": SAID, "code": SAID, "other": CELL}), min_size=1
)


def write_jsonl(path: Path, rows: Table) -> Path:
    path = path.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: Table) -> Path:
    path = path.with_suffix(".csv")
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(buffer.getvalue().encode())
    return path


def write_parquet(path: Path, rows: Table) -> Path:
    path = path.with_suffix(".parquet")
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


WRITERS = [write_jsonl, write_csv, write_parquet]


@pytest.mark.parametrize("write", WRITERS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=ROWS)
def test_a_written_table_is_read_back(
    write: Callable[[Path, Table], Path], rows: Table, tmp_path: Path
) -> None:
    path = write(tmp_path / "table", rows)
    assert list(read_rows(path, PAIR)) == [
        Record(row["patient"], row["note"], row["code"]) for row in rows
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(junk=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_with_our_error(
    junk: bytes, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"junk{suffix}"
    path.write_bytes(b'{"patient": "1", "text": "a"}\n' + junk)
    if suffix == ".csv":
        path.write_bytes(b"patient,text\n1,a\n" + junk)
    with suppress(MalformedRecord):  # any other error fails the test
        records = list(read_rows(path, TEXT))
        assert records[0] == Record("1", "", "a")
        assert all(record.unit and record.completion.strip() for record in records)


def refused(path: Path, content: bytes, columns: Columns = TEXT) -> MalformedRecord:
    path.write_bytes(content)
    with pytest.raises(MalformedRecord) as caught:
        list(read_rows(path, columns))
    assert "nothing was imported" in caught.value.message
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"patient": "2", "text": ', "not JSON"),
        (b'["2", "b"]', "not a JSON object"),
        (b'"text"', "not a JSON object"),
        (b'{"patient": "2"}', "there is no 'text'"),
        (b'{"patient": null, "text": "b"}', "unit 'patient' is null"),
        (b'{"patient": "", "text": "b"}', "'patient' is empty"),
        (b'{"patient": " \\t", "text": "b"}', "'patient' is empty"),
        (b'{"patient": "NaN", "text": "b"}', "a missing value"),
        (b'{"patient": NaN, "text": "b"}', "NaN and Infinity are not JSON"),
        (b'{"patient": 1e999, "text": "b"}', "not a finite number"),
        (b'{"patient": true, "text": "b"}', "is a bool, not text or a number"),
        (b'{"patient": ["2"], "text": "b"}', "is a list, not text or a number"),
        (b'{"patient": "2", "text": null}', "'text' is null"),
        (b'{"patient": "2", "text": " "}', "'text' is empty"),
        (b'{"patient": "2", "text": 7}', "'text' is a int, not text"),
        (b'{"patient": "2", "patient": "3", "text": "b"}', "stands twice"),
        (b'{"patient": "2", "text": "\\ud800"}', "half a character"),
        (b'{"patient": "2", "text": "\xff"}', "not UTF-8"),
        (b'{"patient": "2", "text": "' + b"x" * (MAX_FIELD_CHARACTERS + 1) + b'"}', "longer than"),
        (b'{"patient": "2", "text": "b", "x": "' + b"x" * MAX_LINE_BYTES + b'"}', "longer than"),
        (b'{"patient": "2", "text": "b", "x": ' + b"[" * 200_000 + b"}", "not usable JSON"),
        (b'{"patient": ' + b"9" * 5000 + b', "text": "b"}', "not usable JSON"),
    ],
)
def test_a_bad_json_line_is_named(line: bytes, reason: str, tmp_path: Path) -> None:
    good = b'{"patient": "1", "text": "a"}\n\n'  # the blank second line is skipped but counted
    error = refused(tmp_path / "bad.jsonl", good + line + b"\n" + good)
    assert error.line == 3
    assert reason in error.reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"2\n", "1 fields under 2 columns"),
        (b"2,b,c\n", "3 fields under 2 columns"),
        (b",b\n", "'patient' is empty"),
        (b"nan,b\n", "a missing value"),
        (b"2,\n", "'text' is empty"),
        (b'2,"b"c\n', "not CSV"),
        (b'2,"never closed\n', "not CSV"),
        (b"2,b\rc\n", "not CSV"),
        (b"2,\xe9t\xe9\n", "not UTF-8"),
        (b"2," + b"x" * (MAX_FIELD_CHARACTERS + 1) + b"\n", "field larger than"),
        (b"2," + b"x" * MAX_LINE_BYTES + b"\n", "longer than"),
    ],
)
def test_a_bad_csv_row_is_named(row: bytes, reason: str, tmp_path: Path) -> None:
    good = b'patient,text\n1,"two\nlines"\n'
    error = refused(tmp_path / "bad.csv", good + row)
    assert error.line == 4
    assert reason in error.reason


def test_an_error_does_not_repeat_what_the_row_says(tmp_path: Path) -> None:
    error = refused(tmp_path / "bad.jsonl", b'{"patient": "Ann Lee", "text": "diabetes", }')
    assert "Ann" not in error.message
    assert "diabetes" not in error.message


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (["1", None], "unit 'patient' is null"),
        ([1.0, float("nan")], "not a finite number"),
        (["1", " "], "'patient' is empty"),
    ],
)
def test_a_bad_parquet_row_is_named(values: list[object], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.table({"patient": values, "text": ["a", "b"]}), path)
    with pytest.raises(MalformedRecord, match="line 2") as caught:
        list(read_rows(path, TEXT))
    assert reason in caught.value.reason


def test_a_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "bad.parquet"
    raw = pa.array([b"a", b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"patient": [1, 2], "text": raw}), path)
    with pytest.raises(MalformedRecord) as caught:
        list(read_rows(path, TEXT))
    assert (caught.value.line, caught.value.reason) == (2, "not UTF-8")


def test_a_parquet_column_whose_name_is_not_utf8(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "bad", [{"patient": "1", "text": "a", "other": "b"}])
    path.write_bytes(path.read_bytes().replace(b"other", b"othe\xff"))
    with pytest.raises(DataError, match="column's name is not UTF-8") as caught:
        list(read_rows(path, TEXT))
    assert not isinstance(caught.value, MalformedRecord)  # it stands in no row


def test_parquet_rows_beyond_one_batch_and_column_types(tmp_path: Path) -> None:
    path = tmp_path / "big.parquet"
    texts = pa.array([f"text {number % 7}" for number in range(3000)]).dictionary_encode()
    pq.write_table(pa.table({"patient": range(3000), "text": texts}), path, row_group_size=700)
    records = list(read_rows(path, TEXT))
    assert len(records) == 3000
    assert records[2999] == Record("2999", "", f"text {2999 % 7}")


@pytest.mark.parametrize("kind", [pa.timestamp("ns"), pa.bool_(), pa.binary(), pa.list_(pa.int8())])
def test_a_parquet_column_of_another_type(kind: pa.DataType, tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"patient": pa.array([None], kind), "text": ["a"]}), path)
    with pytest.raises(DataError, match="has the type"):
        list(read_rows(path, TEXT))


@pytest.mark.parametrize("content", [b"", b"no parquet", b"PAR1" + b"\0" * 40 + b"PAR1"])
def test_bytes_that_are_no_parquet(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    path.write_bytes(content)
    with pytest.raises(DataError):
        list(read_rows(path, TEXT))


@pytest.mark.parametrize("write", WRITERS)
def test_a_missing_column_lists_those_that_are_there(
    write: Callable[[Path, Table], Path], tmp_path: Path
) -> None:
    path = write(tmp_path / "table", [{"person": "1", "text": "a"}])
    with pytest.raises(DataError, match="no column 'patient'") as caught:
        list(read_rows(path, TEXT))
    assert caught.value.hint == "its columns are: 'person', 'text'"
    assert not isinstance(caught.value, MalformedRecord)


def test_a_column_that_stands_twice(tmp_path: Path) -> None:
    path = tmp_path / "twice.csv"
    path.write_text("patient,text,text\n1,a,b\n")
    with pytest.raises(DataError, match="more than one column 'text'"):
        list(read_rows(path, TEXT))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", b""), ("a.jsonl", b"\n\n"), ("a.csv", b""), ("a.csv", b"patient,text\n")],
)
def test_a_file_without_records(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match="holds no records"):
        list(read_rows(path, TEXT))


def test_a_parquet_file_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"patient": pa.array([], pa.string()), "text": pa.array([], pa.string())}), path
    )
    with pytest.raises(DataError, match="holds no records"):
        list(read_rows(path, TEXT))


def test_an_unknown_suffix_names_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "table.xlsx"
    path.write_bytes(b"PK")
    with pytest.raises(DataError, match="unknown kind of file") as caught:
        list(read_rows(path, TEXT))
    assert caught.value.hint == "give a file that ends in .jsonl, .csv, .parquet"


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_file_that_is_not_there_and_a_folder(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        list(read_rows(tmp_path / f"none{suffix}", TEXT))
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        list(read_rows(folder, TEXT))


@pytest.mark.parametrize(
    ("value", "unit"),
    [
        ('"7"', "7"), ("7", "7"), ("7.0", "7"), ('" 7\\n"', "7"), ("-0.0", "0"), ("7.5", "7.5"),
        ("12345678901234567890", "12345678901234567890"), ("9" * 400, "9" * 400),
        ('"Jose\\u0301"', "Jos\u00e9"),
    ],
)  # fmt: skip
def test_one_person_is_one_unit_however_it_is_written(
    value: str, unit: str, tmp_path: Path
) -> None:
    path = tmp_path / "units.jsonl"
    path.write_text(f'{{"patient": {value}, "text": "a"}}\n')
    assert next(read_rows(path, TEXT)).unit == unit


def test_decimal_units_in_parquet(tmp_path: Path) -> None:
    path = tmp_path / "units.parquet"
    units = pa.array([7, None], pa.decimal128(6, 2))
    pq.write_table(pa.table({"patient": units, "text": ["a", "b"]}), path)
    assert next(read_rows(path, TEXT)).unit == "7"


def test_text_is_kept_as_it_is_and_a_byte_order_mark_is_not(tmp_path: Path) -> None:
    path = tmp_path / "bom.csv"
    path.write_bytes(b'\xef\xbb\xbfpatient,text\r\n1," Gr\xc3\xbcn, ""x"""\r\n')
    assert list(read_rows(path, TEXT)) == [Record("1", "", ' Grün, "x"')]


def test_columns_know_their_format_and_refuse_two_roles() -> None:
    assert TEXT.format is RecordFormat.TEXT
    assert PAIR.format is RecordFormat.PROMPT_COMPLETION
    with pytest.raises(DataError, match="two roles"):
        Columns(unit="patient", completion="patient")
