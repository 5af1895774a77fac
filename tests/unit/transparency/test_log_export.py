"""What is exported is the signed log: read back by the letter of each format's document."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import jsonschema
import pytest
import rfc8785
from sqlalchemy import delete, update
from tests.unit.kernel.test_auditlog import KEY, entry, plain_root

from llmos.crypto.notes import Checkpoint, open_note
from llmos.errors import ConfigError, TamperedLog
from llmos.kernel.auditlog import AuditLog, LogEntry
from llmos.kernel.monitor import Outcome
from llmos.kernel.policy import Action
from llmos.kernel.schema import KERNEL, log_entries, log_nodes
from llmos.kernel.store import Store
from llmos.transparency import log_export
from llmos.transparency.log_export import ExportFormat, tile_path, write
from llmos.transparency.ocsf import event

SCHEMA: Final = json.loads((Path(__file__).parents[2] / "vectors/ocsf_1_8_0.json").read_text())


@pytest.fixture
def log(tmp_path: Path) -> Iterator[AuditLog]:
    opened = Store.open(tmp_path / "kernel.db", KERNEL)
    yield AuditLog(opened, KEY)
    opened.close()


def fill(log: AuditLog, count: int) -> None:
    with log.store.transaction() as conn:
        log.append_all(conn, map(entry, range(count)))


def written(log: AuditLog, form: ExportFormat, folder: Path) -> Checkpoint:
    folder.mkdir()
    head = write(log, form, folder)
    note = (folder / "checkpoint").read_text()
    assert Checkpoint.parse(open_note(note, KEY.verifier)) == head
    return head


@pytest.mark.parametrize("size", [1, 512, 700])
def test_jsonl_holds_the_leaves_of_the_signed_tree(
    log: AuditLog, tmp_path: Path, size: int
) -> None:
    fill(log, size)
    head = written(log, ExportFormat.JSONL, tmp_path / "out")
    *lines, last = (tmp_path / "out/entries.jsonl").read_bytes().split(b"\n")
    assert (last, len(lines), head.size) == (b"", size, size)
    assert plain_root(lines) == head.root
    assert [json.loads(line) for line in lines] == [entry(n) for n in range(size)]


def read_tile(folder: Path, level: str, index: int, width: int) -> bytes:
    """Fetch a tile as a client would who knows the size."""
    suffix = "" if width == 256 else f".p/{width}"
    return (folder / "tile" / level / f"{tile_path(index)}{suffix}").read_bytes()


def leaves_of(folder: Path, size: int) -> list[bytes]:
    """Read the entry bundles: big-endian uint16 lengths before the entries."""
    found = []
    for start in range(0, size, 256):
        bundle = read_tile(folder, "entries", start // 256, min(256, size - start))
        while bundle:
            (length,) = struct.unpack_from(">H", bundle)
            found.append(bundle[2 : 2 + length])
            bundle = bundle[2 + length :]
    return found


def hashed_root(hashes: list[bytes]) -> bytes:
    if len(hashes) == 1:
        return hashes[0]
    k = 1 << (len(hashes) - 1).bit_length() - 1
    return hashlib.sha256(b"\1" + hashed_root(hashes[:k]) + hashed_root(hashes[k:])).digest()


def check_tiles(folder: Path, size: int) -> list[bytes]:
    """Compare every tile with its definition, MTH(D[(n*256+i)*256**l : (n*256+i+1)*256**l])."""
    leaves = leaves_of(folder, size)
    assert len(leaves) == size
    hashes = [hashlib.sha256(b"\0" + leaf).digest() for leaf in leaves]
    level, files = 0, -(-size // 256)
    while hashes:
        for start in range(0, len(hashes), 256):
            expected = hashes[start : start + 256]
            tile = read_tile(folder, str(level), start // 256, len(expected))
            assert tile == b"".join(expected)
            files += 1
        full = len(hashes) // 256
        hashes = [hashed_root(hashes[256 * n : 256 * (n + 1)]) for n in range(full)]
        level += 1
    assert len([path for path in (folder / "tile").rglob("*") if path.is_file()]) == files
    return leaves


@pytest.mark.parametrize("size", [1, 255, 256, 257, 600])
def test_tiles_are_those_of_the_specification(log: AuditLog, tmp_path: Path, size: int) -> None:
    fill(log, size)
    head = written(log, ExportFormat.TILES, tmp_path / "out")
    assert plain_root(check_tiles(tmp_path / "out", size)) == head.root


def test_the_example_of_seventy_thousand_entries(tmp_path: Path) -> None:
    """The document's own example, https://c2sp.org/tlog-tiles section Partial Tiles."""
    entries = ((LogEntry(n, {}), b"%d" % n) for n in range(70_000))
    head = Checkpoint(KEY.name, 70_000, bytes(32))
    log_export._write_tiles(entries, head, tmp_path)
    tiles = tmp_path / "tile"
    assert len([path for path in (tiles / "0").glob("x*/*") if path.is_file()]) == 0
    assert len([path for path in (tiles / "0").iterdir() if path.is_file()]) == 273
    assert (tiles / "0/273.p/112").stat().st_size == 112 * 32
    assert (tiles / "1/000").stat().st_size == 256 * 32
    assert (tiles / "1/001.p/17").stat().st_size == 17 * 32
    assert (tiles / "2/000.p/1").stat().st_size == 32
    assert not (tiles / "3").exists()
    assert check_tiles(tmp_path, 70_000)[-1] == b"69999"


def test_tile_paths_have_three_digits_an_element() -> None:
    assert [tile_path(n) for n in (0, 67, 999, 1000, 1234067)] == [
        "000",
        "067",
        "999",
        "x001/000",
        "x001/x234/067",
    ]


def test_an_entry_that_no_bundle_can_hold_is_refused(log: AuditLog, tmp_path: Path) -> None:
    with log.store.transaction() as conn:
        log.append(conn, {"long": "x" * 0x10000})
    with pytest.raises(ConfigError, match="65,535 at most"):
        written(log, ExportFormat.TILES, tmp_path / "out")
    written(log, ExportFormat.JSONL, tmp_path / "lines")


@pytest.mark.parametrize("form", ExportFormat)
def test_a_changed_log_is_not_exported(log: AuditLog, tmp_path: Path, form: ExportFormat) -> None:
    fill(log, 9)
    data = rfc8785.dumps(act("chat", "Model::other"))
    leaf = hashlib.sha256(b"\0" + data).digest()
    with log.store.transaction() as conn:  # an entry with a hash that fits: only the root tells
        conn.execute(update(log_entries).filter_by(idx=3).values(data=data))
        conn.execute(update(log_nodes).filter_by(level=0, idx=3).values(hash=leaf))
    with pytest.raises(TamperedLog, match="do not lead to the signed root"):
        written(log, form, tmp_path / "out")


def test_a_log_with_a_hole_is_not_exported(log: AuditLog) -> None:
    fill(log, 9)
    head = Checkpoint.parse(open_note(log.checkpoint(), KEY.verifier))
    with log.store.transaction() as conn:
        conn.execute(delete(log_entries).filter_by(idx=8))
    with pytest.raises(TamperedLog, match="entry 8 is missing"):
        list(log_export._verified(log, head))
    with log.store.transaction() as conn:
        conn.execute(delete(log_entries).filter_by(idx=3))
    with pytest.raises(TamperedLog, match="entry 3 is missing"):
        list(log_export._verified(log, head))


def check_event(made: dict[str, Any]) -> None:
    schema = {**SCHEMA["classes"][str(made["class_uid"])], "$defs": SCHEMA["$defs"]}
    jsonschema.Draft202012Validator(schema).validate(made)


def act(action: str, resource: str, outcome: str = "done", **details: Any) -> dict[str, Any]:
    details = {"policies": ["p"], **details}
    facts = {"action": action, "resource": resource, "outcome": outcome, "details": details}
    return {"v": 1, "at": "2026-01-02T03:04:05.678Z", "actor": "ada", **facts}


@pytest.mark.parametrize("outcome", Outcome)
@pytest.mark.parametrize("action", [*Action, "init", "an act of tomorrow"])
@pytest.mark.parametrize("resource", ["Home::0123", "Dataset::notes", "Model::coder"])
def test_every_act_is_an_event_of_the_official_schema(
    action: str, resource: str, outcome: str
) -> None:
    made = event(LogEntry(7, act(action, resource, outcome)), b"{}", KEY.name)
    check_event(made)
    assert made["status_id"] == (2 if outcome in {"denied", "refused", "failed"} else 1)
    assert made["metadata"]["sequence"] == 7
    assert made["time"] == 1767323045678


@pytest.mark.parametrize(
    ("fields", "type_uid"),
    [
        (act("manage-keys", "Home::0123", user="bo", roles=["auditor"]), 300101),
        (act("manage-keys", "Home::0123", owner="bo", models=["*"], label=""), 300199),
        (act("manage-keys", "Home::0123", revoke="k1"), 600303),
        (act("import-data", "Dataset::notes"), 600506),
        (act("train-private", "Dataset::notes"), 600501),
        (act("plan", "Dataset::notes"), 600599),
        (act("chat", "Model::coder", api_key="k1"), 600399),
        (act("report", "Model::coder"), 600301),
    ],
)
def test_acts_have_the_class_that_a_reader_expects(fields: dict[str, Any], type_uid: int) -> None:
    made = event(LogEntry(0, fields), b"{}", KEY.name)
    check_event(made)
    assert made["type_uid"] == type_uid
    assert made["actor"]["user"].get("credential_uid") == fields["details"].get("api_key")


def test_the_schema_refuses_what_is_no_event() -> None:
    made = event(LogEntry(0, act("chat", "Model::coder")), b"{}", KEY.name)
    wrongs: list[dict[str, Any]] = [{"severity_id": 42}, {"actor": {}}, {"surprise": 1}]
    for wrong in wrongs:
        with pytest.raises(jsonschema.ValidationError):
            check_event({**made, **wrong})


def test_exported_events_hold_the_leaves_of_the_signed_tree(log: AuditLog, tmp_path: Path) -> None:
    fill(log, 9)
    head = written(log, ExportFormat.OCSF, tmp_path / "out")
    events = [json.loads(line) for line in (tmp_path / "out/events.jsonl").read_text().splitlines()]
    for made in events:
        check_event(made)
    assert plain_root([made["raw_data"].encode() for made in events]) == head.root
