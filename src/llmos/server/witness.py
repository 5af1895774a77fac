"""`POST /witness/add-checkpoint` of C2SP tlog-witness: a partner asks for a cosignature.

The partner is known by the signature on its checkpoint and needs no API key.
"""

from __future__ import annotations

import re
from typing import Final

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from llmos.crypto.notes import decode_base64
from llmos.errors import RequestError, StaleCheckpoint, VerificationFailed
from llmos.workflows.parts import Parts
from llmos.workflows.witness import Witness

PATH: Final = "/witness/add-checkpoint"
_MOST_PROOF_LINES: Final = 63
_OLD_SIZE: Final = re.compile(r"old (0|[1-9][0-9]{0,18})")


def routes(parts: Parts) -> list[Route]:
    """Return the route of the witness of one home."""
    kernel = parts.kernel
    witness = Witness(kernel.store, kernel.monitor, kernel.auditlog.key, kernel.home)

    async def add_checkpoint(request: Request) -> Response:
        old_size, proof, note = parse_body(await request.body())
        try:
            line = await run_in_threadpool(
                lambda: witness.add_checkpoint(kernel.principal(), old_size, proof, note)
            )
        except StaleCheckpoint as error:
            size = {"Content-Type": "text/x.tlog.size"}
            return Response(f"{error.size}\n", error.http_status, size)
        return PlainTextResponse(line)

    return [Route(PATH, add_checkpoint, methods=["POST"])]


def parse_body(body: bytes) -> tuple[int, tuple[bytes, ...], str]:
    """Return old size, consistency proof and checkpoint note.

    Raises:
        RequestError: the body is not what the specification says.
    """
    try:
        head, separator, note = body.decode().partition("\n\n")
        first, *lines = head.split("\n")
        proof = tuple(decode_base64(line) for line in lines)
    except (UnicodeDecodeError, VerificationFailed) as error:
        raise RequestError("the body is not text, or its proof is not base64") from error
    old_size = _OLD_SIZE.fullmatch(first)
    if old_size is None or not separator or len(proof) > _MOST_PROOF_LINES:
        raise RequestError("the body is not an old size, a proof, an empty line and a checkpoint")
    return int(old_size[1]), proof, note
