"""What a home makes of its partners' answers: canned ones, over real HTTP."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from sqlalchemy import select
from tests.homes import close, last_records

from llmos import system as systems
from llmos.crypto.notes import Checkpoint, NoteKey, open_note
from llmos.errors import (
    CheckpointRefused,
    ConfigError,
    LlmosError,
    NetworkError,
    TamperedLog,
    VerificationFailed,
)
from llmos.kernel.schema import log_checkpoints, log_cosignatures
from llmos.server.witness import parse_body
from llmos.system import System
from llmos.transparency.audit_paths import verify_consistency
from llmos.transparency.cosignatures import cosign

BO = NoteKey("llmos.local/b0b0", bytes(range(32)))
CY = NoteKey("llmos.local/cccc", bytes(32))


@dataclass
class Canned:
    """A server that answers what it is told to and keeps what it was asked."""

    answers: list[tuple[int, bytes]] = field(default_factory=list)
    asked: list[tuple[str, bytes]] = field(default_factory=list)
    url: str = ""

    def cosignature(self, key: NoteKey = BO) -> bytes:
        """Sign whatever was asked last."""
        note = parse_body(self.asked[-1][1])[2]
        return cosign(note.partition("\n\n")[0] + "\n", key, 1_700_000_000).encode()


@pytest.fixture
def server() -> Iterator[Canned]:
    canned = Canned()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            canned.asked.append((self.path, body))
            status, answer = canned.answers.pop(0)
            if answer == b"COSIGN":
                answer = b"x\n" + canned.cosignature(CY) + canned.cosignature()
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        canned.url = f"http://127.0.0.1:{listening.server_address[1]}/witness"
        yield canned
        listening.shutdown()
        thread.join()


@pytest.fixture
def made(tmp_path: Path) -> Iterator[System]:
    made = systems.create(tmp_path / "home")
    yield made
    close(made)


@pytest.fixture
def partnered(made: System, server: Canned) -> System:
    made.log.add_partner("bo", BO.vkey, url=server.url + "/")
    return made


def test_a_cosignature_is_kept_with_its_checkpoint_and_recorded(
    partnered: System, server: Canned
) -> None:
    server.answers = [(200, b"COSIGN")]
    said = partnered.log.cosign()
    path, body = server.asked[0]
    old_size, proof, note = parse_body(body)
    assert (path, old_size, proof) == ("/witness/add-checkpoint", 0, ())
    assert (said.size, list(said.lines), said.refusals) == (2, ["bo"], {})
    with partnered.kernel.store.read() as conn:
        assert conn.execute(select(log_checkpoints.c.note).filter_by(size=2)).scalar_one() == note
        assert conn.execute(select(log_cosignatures)).all() == [(2, "bo", said.lines["bo"])]
    record = last_records(partnered, 1)[0]
    assert record["action"] == "manage-partners"
    assert (record["details"]["cosigned"], record["details"]["by"]) == (2, ["bo"])
    # The next proof begins where the last one ended.
    server.answers = [(200, b"COSIGN")]
    assert partnered.log.cosign().size == 3
    old_size, proof, newer = parse_body(server.asked[1][1])
    old, new = (
        Checkpoint.parse(open_note(n, partnered.kernel.auditlog.key.verifier))
        for n in (note, newer)
    )
    assert old_size == 2
    assert verify_consistency(2, 3, old.root, new.root, proof)
    assert [c.size for c in partnered.log.cosigned()] == [3, 2]


def test_a_partner_that_saw_more_than_is_remembered_corrects_the_proof(
    partnered: System, server: Canned
) -> None:
    server.answers = [(409, b"1\n"), (200, b"COSIGN")]
    assert partnered.log.cosign().refusals == {}
    assert [parse_body(body)[0] for _, body in server.asked] == [0, 1]


REFUSALS: dict[str, tuple[list[tuple[int, bytes]], type[LlmosError], str]] = {
    "rolled back": ([(409, b"9\n")], TamperedLog, "bo saw 9 entries of this log, it has 2 now"),
    "other root": ([(409, b"0\n")], TamperedLog, "bo saw other 0 entries"),
    "forked": ([(409, b"1\n"), (422, b"")], TamperedLog, "no beginning of what it has now"),
    "raced": ([(409, b"1\n"), (409, b"2\n")], TamperedLog, "no beginning"),
    "not added": ([(404, b"")], CheckpointRefused, "does not know this log"),
    "other key": ([(403, b"")], CheckpointRefused, "under another key"),
    "broken": ([(500, b"")], NetworkError, "answered with status 500"),
    "no size": ([(409, b"x")], NetworkError, "409 without a size"),
    "endless": ([(200, bytes(1 << 17))], NetworkError, "too many bytes"),
    "nothing": ([(200, b"")], VerificationFailed, "without a cosignature of its key"),
    "stranger": (
        [(200, cosign("x\n", BO, 1).encode())],
        VerificationFailed,
        "without a cosignature",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_told_apart_and_recorded_and_nothing_is_kept(
    partnered: System, server: Canned, name: str
) -> None:
    answers, error, text = REFUSALS[name]
    server.answers = list(answers)
    said = partnered.log.cosign()
    assert said.lines == {}
    assert type(said.refusals["bo"]) is error
    assert text in str(said.refusals["bo"])
    assert last_records(partnered, 1)[0]["details"]["refused"] == {"bo": error.__name__}
    assert partnered.log.cosigned() == []


def test_one_partner_that_refuses_does_not_cost_the_others(
    partnered: System, server: Canned
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    partnered.log.add_partner("cy", CY.vkey, url=f"http://127.0.0.1:{port}/witness")
    server.answers = [(200, b"COSIGN")]
    said = partnered.log.cosign()
    assert list(said.lines) == ["bo"]
    assert isinstance(said.refusals["cy"], NetworkError)
    assert "could not be reached" in str(said.refusals["cy"])
    assert [c.partner for c in partnered.log.cosigned()] == ["bo"]


def test_without_a_partner_to_ask_it_says_so(made: System) -> None:
    made.log.add_partner("silent", BO.vkey)
    with pytest.raises(ConfigError, match="no partner takes this home's checkpoints"):
        made.log.cosign()
