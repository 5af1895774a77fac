"""An export of the log is allowed, recorded, and whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import update
from tests.homes import last_records, log_size

from llmos.crypto.merkle import leaf_hash
from llmos.errors import ConfigError, PermissionDenied, StorageError, TamperedLog
from llmos.kernel.identity import Role
from llmos.kernel.schema import log_entries, log_nodes
from llmos.system import System
from llmos.transparency.log_export import ExportFormat
from llmos.workflows import export_log


def test_an_export_is_recorded_after_what_it_holds(system: System, tmp_path: Path) -> None:
    before = log_size(system)
    assert system.log.export("jsonl", tmp_path / "out") == before
    lines = (tmp_path / "out/entries.jsonl").read_text().splitlines()
    assert [json.loads(line)["action"] for line in lines[:1]] == ["init"]
    assert len(lines) == before
    assert log_size(system) == before + 1
    record = last_records(system, 1)[0]
    assert (record["action"], record["outcome"]) == ("read-log", "done")
    assert record["details"]["export"] == "jsonl"
    assert record["details"]["entries"] == before


def test_only_who_may_read_the_log_exports_it(system: System, tmp_path: Path) -> None:
    kernel = system.kernel
    with kernel.store.transaction() as conn:
        bo = kernel.identity.add_principal(conn, "bo", frozenset({Role.ENGINEER}))
        ida = kernel.identity.add_principal(conn, "ida", frozenset({Role.AUDITOR}))
    with pytest.raises(PermissionDenied):
        export_log.run(ExportFormat.TILES, tmp_path / "out", bo, system.parts)
    assert list(tmp_path.glob("*out*")) == []
    export_log.run(ExportFormat.TILES, tmp_path / "out", ida, system.parts)
    with pytest.raises(StorageError, match="is there already"):
        export_log.run(ExportFormat.OCSF, tmp_path / "out", ida, system.parts)
    with pytest.raises(ConfigError, match="unknown format"):
        system.log.export("xml", tmp_path / "xml")


def test_nothing_half_written_is_left(system: System, tmp_path: Path) -> None:
    with system.kernel.store.transaction() as conn:
        conn.execute(update(log_entries).filter_by(idx=0).values(data=b"{}"))
        conn.execute(update(log_nodes).filter_by(level=0, idx=0).values(hash=leaf_hash(b"{}")))
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(TamperedLog):
        system.log.export("jsonl", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == before
