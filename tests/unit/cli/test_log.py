"""`llmos log`: what it says about a log, sound or changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.databases import outside
from tests.unit.cli.conftest import Type

from llmos.config import Config
from llmos.crypto.notes import NoteKey
from llmos.kernel import kernel as kernels


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Return a fresh home without models or data."""
    made = kernels.create(Config(home=tmp_path / "home"))
    made.store.close()
    made.vault._store.close()
    return tmp_path / "home"


def change(home: Path, statement: str) -> None:
    with outside(home) as conn:
        conn.exec_driver_sql(statement)


def contents(home: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in home.rglob("*") if path.is_file()}


def test_a_changed_log_is_refused_and_inspection_names_the_place(
    plain: Path, typing: Callable[[Path], Type]
) -> None:
    typed = typing(plain)
    assert typed("log", "show").status == 0
    typed = typing(plain)
    sound = typed("log", "inspect")
    assert (sound.status, sound.out) == (
        0,
        "1 entries, their hashes and the signed checkpoint agree\n",
    )
    change(plain, "INSERT INTO log_nodes SELECT 3, 0, hash FROM log_nodes")
    refused = typing(plain)("log", "show")
    assert refused.status == 10
    assert "`llmos log inspect` says what differs" in refused.err
    (plain / "root.key").unlink()  # no key is needed
    before = contents(plain)
    found = typed("log", "inspect")
    assert found.status == 10
    assert found.out.splitlines() == [
        "  hash of level 3, place 0: it belongs to no entry",
        "every entry is as it was signed; what differs lies beside the entries",
    ]
    said = typed("log", "inspect", "--json")
    assert said.status == 10
    assert said.value == {
        "entries": 1,
        "signature_checked": True,
        "entries_as_signed": True,
        "differences": [
            {"where": "hash of level 3, place 0", "what": "it belongs to no entry"},
        ],
    }
    (plain / "home.pub").unlink()
    change(plain, "UPDATE log_entries SET data = (SELECT hash FROM log_nodes LIMIT 1)")
    unsigned = typed("log", "inspect")
    assert unsigned.status == 10
    assert "no signature was checked" in unsigned.out
    assert "as it was signed" not in unsigned.out
    del before[str(plain / "home.pub")]
    assert before.keys() == contents(plain).keys()


def test_inspection_leaves_every_byte_of_the_home(
    plain: Path, typing: Callable[[Path], Type]
) -> None:
    change(plain, "DELETE FROM log_checkpoints")
    before = contents(plain)
    assert typing(plain)("log", "inspect").status == 10
    assert contents(plain) == before


def test_an_export_says_where_and_how_much(plain: Path, typing: Callable[[Path], Type]) -> None:
    typed = typing(plain)
    folder = plain.parent / "tiles"
    said = typed("log", "export", "--as", "tiles", str(folder))
    assert (said.status, said.out) == (0, f"{folder}: 1 entries as tiles\n")
    again = typed("log", "export", "--as", "tiles", str(folder))
    assert again.status == 12
    said = typed("log", "export", "--as", "ocsf", str(plain.parent / "events"), "--json")
    assert said.value["entries"] == 2


def test_partners_are_added_listed_and_removed(plain: Path, typing: Callable[[Path], Type]) -> None:
    typed = typing(plain)
    vkey = NoteKey("llmos.local/b0b0", bytes(range(32))).vkey
    assert typed("log", "partner", "ls").out == "no partners\n"
    added = typed("log", "partner", "add", "bo", vkey, "--url", "http://127.0.0.1:1/witness")
    assert (added.status, added.out) == (0, "bo: llmos.local/b0b0\n")
    assert "llmos.local/b0b0" in typed("log", "partner", "ls").out
    (row,) = typed("log", "partner", "ls", "--json").value
    assert (row["name"], row["vkey"], row["url"]) == ("bo", vkey, "http://127.0.0.1:1/witness")
    assert typed("log", "partner", "add", "bo", vkey).status == 4
    refused = typed("log", "cosign")
    assert refused.status == 13
    assert "bo could not be reached" in refused.err
    assert typed("log", "verify", "--json").value["cosigned"] == []
    removed = typed("log", "partner", "remove", "bo")
    assert (removed.status, removed.out) == (0, "bo is no partner any more\n")
    gone = typed("log", "partner", "remove", "bo", "--json")
    assert gone.status == 4
    added = typed("log", "partner", "add", "bo", vkey, "--json")
    assert added.value["log"] == "llmos.local/b0b0"
    assert typed("log", "partner", "remove", "bo", "--json").value == {"removed": "bo"}
