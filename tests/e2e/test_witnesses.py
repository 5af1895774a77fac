"""Two real homes with two real servers witness each other; a rolled back one is found out."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from tests.homes import opened, run_llmos, running

from llmos.crypto.notes import Checkpoint, NoteKey, Verifier, open_note, sign_note
from llmos.transparency.cosignatures import verify_cosignature
from llmos.workflows.cosign import request_body


@dataclass(frozen=True)
class Site:
    """A home and the address of its server."""

    home: Path
    url: str

    @property
    def log_vkey(self) -> str:
        return (self.home / "home.pub").read_text().splitlines()[1]

    def typed(self, *arguments: str, status: int = 0) -> str:
        said = run_llmos(self.home, *arguments)
        assert said.returncode == status, (said.stdout, said.stderr)
        return said.stdout + said.stderr


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[tuple[Site, Site]]:
    with ExitStack() as servers:
        found = []
        for name in ("ada", "bo"):
            home = tmp_path / name
            assert run_llmos(home, "init").returncode == 0
            server = servers.enter_context(running(home, "serve", "--port", "0"))
            assert server.stdout is not None
            line = server.stdout.readline()
            assert line.startswith("serving on http://127.0.0.1:"), line
            found.append(Site(home, line.split()[2].removesuffix("/v1")))
        ada, bo = found
        ada.typed("log", "partner", "add", "bo", bo.log_vkey, "--url", f"{bo.url}/witness")
        bo.typed("log", "partner", "add", "ada", ada.log_vkey, "--url", f"{ada.url}/witness")
        yield ada, bo


def head_of(site: Site) -> tuple[str, Checkpoint]:
    with opened(site.home) as system:
        note = system.kernel.auditlog.checkpoint()
    return note, Checkpoint.parse(open_note(note, Verifier.parse(site.log_vkey)))


def grow(site: Site, *names: str) -> None:
    with opened(site.home) as system:
        for name in names:
            system.access.add_user(name, ["auditor"])


@pytest.mark.slow
@pytest.mark.sqlite("its file is put back")
def test_two_homes_cosign_each_other_and_find_a_rollback(
    sites: tuple[Site, Site], tmp_path: Path
) -> None:
    ada, bo = sites
    for site, other in ((ada, "bo"), (bo, "ada")):
        assert f"cosigned by {other}" in site.typed("log", "cosign")
        assert f"entries cosigned by {other}: 20" in site.typed("log", "verify")
    listed = json.loads(ada.typed("log", "partner", "ls", "--json"))
    assert [(row["name"], row["vkey"]) for row in listed] == [("bo", bo.log_vkey)]

    proof = tmp_path / "entry.proof"
    ada.typed("log", "prove", "0", str(proof))
    note = json.loads(proof.read_text())["checkpoint"]
    text, _, lines = note.partition("\n\n")
    assert verify_cosignature(lines.split("\n")[1], text + "\n", Verifier.parse(bo.log_vkey))
    proven = run_llmos(ada.home, "verify", str(proof), "--key", str(ada.home / "home.pub"))
    assert proven.returncode == 0, proven.stderr

    older = tmp_path / "older.db"
    with (
        closing(sqlite3.connect(ada.home / "kernel.db")) as source,
        closing(sqlite3.connect(older)) as copy,
    ):
        source.backup(copy)
    grow(ada, "cy", "dee")
    assert "cosigned by bo" in ada.typed("log", "cosign")  # by a proof from the size before
    seen = head_of(ada)[1].size - 1  # the record of the cosigning came after

    for suffix in ("-wal", "-shm"):
        (ada.home / f"kernel.db{suffix}").unlink(missing_ok=True)
    shutil.copyfile(older, ada.home / "kernel.db")
    assert "agree with the tree" in ada.typed("log", "verify")  # alone, the home sees nothing
    said = ada.typed("log", "cosign", status=10)
    assert f"bo saw {seen} entries of this log" in said
    assert "rolled back" in said
    grow(ada, *(f"other{n}" for n in range(6)))  # now it has another history of a larger size
    assert head_of(ada)[1].size > seen
    assert "no beginning of what it has now" in ada.typed("log", "cosign", status=10)


@pytest.mark.slow
def test_the_endpoint_answers_as_the_document_says(sites: tuple[Site, Site]) -> None:
    ada, bo = sites
    note, head = head_of(ada)

    def post(content: bytes) -> httpx.Response:
        return httpx.post(f"{bo.url}/witness/add-checkpoint", content=content)

    stranger = NoteKey(ada.log_vkey.partition("+")[0], bytes(32))
    nobody = NoteKey("llmos.local/nobody", bytes(32))
    assert post(b"nonsense").status_code == 400
    assert post(request_body(head.size + 1, [], note)).status_code == 400
    unknown = sign_note(Checkpoint(nobody.name, 1, bytes(32)).text(), nobody)
    assert post(request_body(0, [], unknown)).status_code == 404
    forged = sign_note(head.text(), stranger)
    assert post(request_body(0, [], forged)).status_code == 403
    answer = post(request_body(0, [], note))
    assert (answer.status_code, answer.headers["content-type"]) == (
        200,
        "text/plain; charset=utf-8",
    )
    assert verify_cosignature(answer.text, head.text(), Verifier.parse(bo.log_vkey))
    grow(ada, "cy")
    newer, _ = head_of(ada)
    stale = post(request_body(0, [], newer))
    assert (stale.status_code, stale.headers["content-type"], stale.text) == (
        409,
        "text/x.tlog.size",
        f"{head.size}\n",
    )
    assert post(request_body(head.size, [bytes(32)], newer)).status_code == 422
    assert httpx.get(f"{bo.url}/witness/add-checkpoint").status_code == 405
    assert httpx.get(f"{bo.url}/v1/models").status_code == 401  # the rest still needs a key
