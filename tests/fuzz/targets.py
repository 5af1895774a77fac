"""Parsers of untrusted bytes under a coverage-guided fuzzer: only errors of ours may leave them.

`python -m tests.fuzz.targets NAME FOLDER [libFuzzer options]` writes the seeds of one target into
the folder and fuzzes from there until the time is up (0) or something is found (another status).
A target imports what it needs itself, so that little has to be instrumented.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import atheris

FOLDER: Final = Path(tempfile.mkdtemp())
SIZE: Final = 7
Target = tuple[Callable[[bytes], object], list[bytes]]  # the parser, and what it accepts


def text(data: bytes) -> str:
    """Decode so that every byte comes through."""
    return data.decode("utf-8", "surrogateescape")


def canonical(value: object) -> bytes:
    """Encode JSON values as RFC 8785 does, for the few that are used here."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def notes() -> Target:
    """Read signed notes, the checkpoints in them, cosignatures and verifier keys."""
    from llmos.crypto.notes import Checkpoint, NoteKey, Verifier, open_note, sign_note
    from llmos.errors import LlmosError
    from llmos.transparency.cosignatures import cosign, verify_cosignature

    key = NoteKey("log", bytes(32))
    head = Checkpoint("log", SIZE, bytes(32)).text()

    def read(data: bytes) -> None:
        for parse in (
            lambda note: Checkpoint.parse(open_note(note, key.verifier)),
            Checkpoint.parse,
            Verifier.parse,
            lambda line: verify_cosignature(line, head, key.verifier),
        ):
            with contextlib.suppress(LlmosError):
                parse(text(data))

    line = cosign(head, key, 1_700_000_000)
    return read, [seed.encode() for seed in (sign_note(head, key), head, key.vkey, line)]


def log_proof() -> Target:
    """Read log proofs, fields first."""
    from llmos.crypto.notes import Checkpoint, NoteKey, sign_note
    from llmos.transparency.proofs import LogProof, verify_proof

    key = NoteKey("log", bytes(32))
    note = sign_note(Checkpoint("log", 1, bytes(32)).text(), key)
    proof = {"schema": "llmos.log-proof/v1", "index": 0, "size": 1, "hashes": ["AA=="]}

    def read(data: bytes) -> None:
        with contextlib.suppress(ValueError, RecursionError):  # what is no JSON comes no further
            fields = json.loads(data)
            if isinstance(fields, dict):
                verify_proof(LogProof.from_dict(fields), key.verifier)

    return read, [canonical(proof | {"checkpoint": note, "entry": "{}"})]


def certificate() -> Target:
    """Read certificates: envelope, proof and statement."""
    from llmos.crypto import dsse
    from llmos.crypto.notes import NoteKey
    from llmos.reports.certificate import MEDIA_TYPE
    from llmos.reports.verification import verify_bundle

    key = NoteKey("log", bytes(32))
    envelope = dsse.sign(b"{}", dsse.IN_TOTO, key)
    seed = {"mediaType": MEDIA_TYPE, "envelope": envelope, "log_proof": {}}
    return lambda data: verify_bundle(data, f"{key.vkey}\n{key.vkey}\n"), [canonical(seed)]


def envelope() -> Target:
    """Read DSSE envelopes."""
    from llmos.crypto import dsse
    from llmos.crypto.notes import NoteKey

    key = NoteKey("log", bytes(32))

    def read(data: bytes) -> None:
        with contextlib.suppress(ValueError, RecursionError):
            fields = json.loads(data)
            if isinstance(fields, dict):
                dsse.open_envelope(fields, key.verifier)

    return read, [canonical(dsse.sign(b"{}", dsse.IN_TOTO, key))]


def mechanism() -> Target:
    """Read mechanisms, which come back as they were written."""
    from llmos.privacy import PoissonSampledGaussian, mechanism_from_dict, mechanism_to_dict

    def read(data: bytes) -> None:
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError):
            return
        if isinstance(fields, dict):
            found = mechanism_from_dict(fields)
            assert mechanism_from_dict(mechanism_to_dict(found)) == found

    return read, [canonical(mechanism_to_dict(PoissonSampledGaussian(0.5, 1.0, 3)))]


def ciphertext() -> Target:
    """Read encrypted objects as a stream and at random; both refuse the same."""
    from llmos.crypto import encryption
    from llmos.errors import TamperedObject

    key = bytes(32)

    def read(data: bytes) -> None:
        plain = io.BytesIO()
        try:
            encryption.decrypt(key, io.BytesIO(data), plain, context=b"")
        except TamperedObject:
            plain = io.BytesIO(b"refused")
        with contextlib.suppress(TamperedObject):
            at_random = encryption.DecryptingReader(key, io.BytesIO(data), b"").readall()
            assert at_random == plain.getvalue()

    seeds = []
    for content in (b"", b"text"):
        sink = io.BytesIO()
        encryption.encrypt(key, io.BytesIO(content), sink, context=b"")
        seeds.append(sink.getvalue())
    return read, seeds


def api_key() -> Target:
    """Read API keys."""
    from llmos.kernel.identity import Identity, Role
    from llmos.kernel.schema import KERNEL
    from llmos.kernel.store import Store

    identity = Identity(Store.open(FOLDER / "kernel.db", KERNEL), bytes(32))
    with identity._store.transaction() as conn:
        who = identity.add_principal(conn, "ada", frozenset({Role.AUDITOR}))
        token = identity.create_key(conn, who, "", None, None).token
    return lambda data: identity.authenticate(text(data)), [token.encode()]


def policy() -> Target:
    """Read policies."""
    from llmos.kernel.policy import DEFAULTS, SCHEMA_FILE, Policy

    (FOLDER / SCHEMA_FILE).write_bytes((DEFAULTS / SCHEMA_FILE).read_bytes())

    def read(data: bytes) -> None:
        (FOLDER / "one.cedar").write_bytes(data)
        Policy.load(FOLDER)

    return read, [(DEFAULTS / "default.cedar").read_bytes()]


def root_json() -> Target:
    """Read root.json; a passphrase that costs more than a little would only be slow."""
    from llmos.config import Config
    from llmos.crypto.root_keys import Argon2Cost, Passphrase
    from llmos.kernel import root

    config = Config(home=FOLDER, key_file=FOLDER / "none")

    def read(data: bytes) -> None:
        if any(digit in data.replace(b"argon2id", b"") for digit in b"2345679"):
            return
        (FOLDER / "root.json").write_bytes(data)
        root.unlock(config, passphrase="word")

    sealed = {"v": 1, **Passphrase("word", Argon2Cost(8, 1, 1)).seal(bytes(32))}
    sealed["sealed"] |= {"salt": "A" * 22 + "==", "sealed": "A" * 80}
    return read, [canonical(sealed), b'{"v":1,"provider":"key-file"}']


def rows(suffix: str) -> Target:
    """Read a file of records."""
    from pyarrow import parquet, table

    from llmos.data import importers

    path, columns = FOLDER / f"rows{suffix}", importers.Columns(unit="u", completion="t")

    def read(data: bytes) -> None:
        path.write_bytes(data)
        for _ in importers.read_rows(path, columns):
            pass

    sink = io.BytesIO()
    parquet.write_table(table({"u": ["a", "b"], "t": ["c", "d"]}), sink)
    seeds = {
        ".jsonl": b'{"u":"a","t":"b"}\n{"u":1,"t":"c"}\n',
        ".csv": b'u,t\na,"b ""c"""\n1,d\n',
        ".parquet": sink.getvalue(),
    }
    return read, [seeds[suffix]]


def chat_request() -> Target:
    """Read the body of a chat completion."""
    from llmos.server.schema import ChatCompletionRequest

    seed = b'{"model":"m","messages":[{"role":"user","content":"hi"}],"stop":["a"],"seed":1}'
    return lambda data: ChatCompletionRequest.parse(data).to_chat(), [seed]


def witness_request() -> Target:
    """Read the body of a witness's add-checkpoint."""
    from llmos.server.witness import parse_body

    return parse_body, [b"old 1\nAAAA\n\nlog\n7\nAAAA\n\n\xe2\x80\x94 log AAAA\n"]


def canary_book() -> Target:
    """Read canary books."""
    from llmos.data import canaries

    return canaries.decode_book, [canaries.encode_book(canaries.make_canaries(2))]


TARGETS: Final[dict[str, Callable[[], Target]]] = {
    "api-key": api_key,
    "canary-book": canary_book,
    "certificate": certificate,
    "chat-request": chat_request,
    "ciphertext": ciphertext,
    "csv": lambda: rows(".csv"),
    "envelope": envelope,
    "jsonl": lambda: rows(".jsonl"),
    "log-proof": log_proof,
    "mechanism": mechanism,
    "notes": notes,
    "parquet": lambda: rows(".parquet"),
    "policy": policy,
    "root-json": root_json,
    "witness-request": witness_request,
}


def main(name: str, folder: str, *options: str) -> None:
    """Fuzz one target; libFuzzer ends the process."""
    with atheris.instrument_imports(include=["llmos"]):
        from llmos.errors import LlmosError

        parse, seeds = TARGETS[name]()
    for number, seed in enumerate(seeds):
        (Path(folder) / f"seed-{number}").write_bytes(seed)

    def only_our_errors(data: bytes) -> None:
        with contextlib.suppress(LlmosError):
            parse(data)

    atheris.Setup([sys.argv[0], folder, *options], only_our_errors)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
