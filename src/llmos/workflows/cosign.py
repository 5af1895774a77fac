"""Send the newest checkpoint to the partners and keep their cosignatures (C2SP tlog-witness)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import httpx
from sqlalchemy import Connection, delete, func, insert, select

from llmos.crypto.notes import Checkpoint, encode_base64, open_note
from llmos.errors import (
    CheckpointRefused,
    ConfigError,
    LlmosError,
    NetworkError,
    TamperedLog,
    VerificationFailed,
)
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.kernel.schema import log_checkpoints, log_cosignatures
from llmos.transparency.cosignatures import verify_cosignature
from llmos.transparency.proofs import prove_consistency
from llmos.workflows.partners import Partner, partners
from llmos.workflows.parts import Parts

_TIMEOUT_S: Final = 30.0
_LARGEST_ANSWER_BYTES: Final = 1 << 16
_CONFLICT: Final = 409
_SIZE: Final = re.compile(r"(0|[1-9][0-9]{0,18})\n")


@dataclass(frozen=True, slots=True)
class Cosigning:
    """What the partners said about one checkpoint."""

    size: int
    lines: dict[str, str]  # partner -> cosignature, kept
    refusals: dict[str, LlmosError]  # partner -> why there is none


def run(who: Principal, parts: Parts) -> Cosigning:
    """Ask every partner that has a URL; keep what was cosigned even where another one refused.

    Raises:
        ConfigError: no partner has a URL.
        PermissionDenied: policy does not let this principal manage partners.
    """
    kernel = parts.kernel
    kernel.monitor.authorize(who, Action.MANAGE_PARTNERS, parts.kernel.home)
    asked = [partner for partner in partners(kernel.store) if partner.url is not None]
    if not asked:
        raise ConfigError(
            "no partner takes this home's checkpoints",
            hint="llmos log partner add NAME VKEY --url URL",
        )
    note = kernel.auditlog.checkpoint()
    head = Checkpoint.parse(open_note(note, kernel.auditlog.key.verifier))
    lines: dict[str, str] = {}
    refusals: dict[str, LlmosError] = {}
    with httpx.Client(timeout=_TIMEOUT_S) as client:
        for partner in asked:
            try:
                lines[partner.name] = _ask(client, partner, note, head, parts)
            except LlmosError as error:
                refusals[partner.name] = error
    details = {
        "cosigned": head.size,
        "by": sorted(lines),
        "refused": {name: type(error).__name__ for name, error in refusals.items()},
    }
    with kernel.monitor.act(
        who, Action.MANAGE_PARTNERS, parts.kernel.home, details=details
    ) as conn:
        for name, line in lines.items():
            _keep(conn, head.size, note, name, line)
    return Cosigning(head.size, lines, refusals)


def _keep(conn: Connection, size: int, note: str, partner: str, line: str) -> None:
    """Keep a line and the checkpoint that it is of; the log may have grown meanwhile."""
    for table, row in (
        (log_checkpoints, {"size": size, "note": note}),
        (log_cosignatures, {"size": size, "partner": partner, "line": line}),
    ):
        same = (table.c[column.name] == row[column.name] for column in table.primary_key)
        conn.execute(delete(table).where(*same))
        conn.execute(insert(table).values(row))


def _ask(client: httpx.Client, partner: Partner, note: str, head: Checkpoint, parts: Parts) -> str:
    """Return the partner's verified cosignature line.

    The proof begins at what this home believes that the partner saw; the partner corrects it once.
    """
    old_size = min(_last_cosigned(partner.name, parts), head.size)
    status, answer = _post(client, partner, note, head, old_size, parts)
    if status == _CONFLICT:
        seen = _seen_size(partner, answer)
        if seen > head.size:
            raise _forked(f"{partner.name} saw {seen} entries of this log, it has {head.size} now")
        if seen == old_size:
            raise _forked(f"{partner.name} saw other {seen} entries in this log")
        status, answer = _post(client, partner, note, head, seen, parts)
    match status:
        case 200:
            return _cosignature(partner, head, answer)
        case 409 | 422:
            raise _forked(f"what {partner.name} saw of this log is no beginning of what it has now")
        case 404:
            raise CheckpointRefused(
                f"{partner.name} does not know this log",
                hint=f"have it add this key: {parts.kernel.auditlog.key.vkey}",
            )
        case 403:
            raise CheckpointRefused(
                f"{partner.name} knows this log under another key, or may not witness it",
                hint=f"have it add this key: {parts.kernel.auditlog.key.vkey}",
            )
    raise NetworkError(f"{partner.name} answered with status {status}", hint=f"see {partner.url}")


def _post(
    client: httpx.Client,
    partner: Partner,
    note: str,
    head: Checkpoint,
    old_size: int,
    parts: Parts,
) -> tuple[int, str]:
    proof = prove_consistency(parts.kernel.auditlog, old_size, head.size)
    content = request_body(old_size, proof, note)
    url = f"{str(partner.url).rstrip('/')}/add-checkpoint"
    try:
        with client.stream("POST", url, content=content) as response:
            answer = b""
            for part in response.iter_bytes():
                answer += part
                if len(answer) > _LARGEST_ANSWER_BYTES:
                    raise NetworkError(f"{partner.name} answered with too many bytes")
        return response.status_code, answer.decode("utf-8", "replace")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise NetworkError(
            f"{partner.name} could not be reached at {partner.url}: {error}",
            hint="its server must be running: llmos serve",
        ) from error


def request_body(old_size: int, proof: Sequence[bytes], note: str) -> bytes:
    """Return the body of `add-checkpoint`: old size, proof lines, an empty line, the checkpoint."""
    lines = "".join(f"{encode_base64(node)}\n" for node in proof)
    return f"old {old_size}\n{lines}\n{note}".encode()


def _cosignature(partner: Partner, head: Checkpoint, answer: str) -> str:
    for line in answer.splitlines(keepends=True):
        try:
            verify_cosignature(line, head.text(), partner.verifier)
        except VerificationFailed:
            continue  # of a key that this home does not know; the specification says to ignore it
        return f"{line.removesuffix(chr(10))}\n"
    raise VerificationFailed(f"{partner.name} answered without a cosignature of its key")


def _seen_size(partner: Partner, answer: str) -> int:
    match = _SIZE.fullmatch(answer)
    if match is None:
        raise NetworkError(f"{partner.name} answered 409 without a size")
    return int(match[1])


def _last_cosigned(partner: str, parts: Parts) -> int:
    newest = select(func.max(log_cosignatures.c.size)).where(log_cosignatures.c.partner == partner)
    with parts.kernel.store.read() as conn:
        return conn.execute(newest).scalar_one() or 0


def _forked(what: str) -> TamperedLog:
    return TamperedLog(
        f"this log was rolled back or has two histories: {what}",
        hint="find the newest kernel.db of this home; what is missing here was done and recorded",
    )
