"""The coordinator's routes, `/federation/...`: for sites that show their certificate, nobody else.

A site asks (`poll`, answered when there is something new), answers a proposal, fetches the global
weights and sends its part of a round. There is no route by which anything could be run.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from llmos.errors import LlmosError, RequestError, RequestTooLarge
from llmos.federations.statement import LARGEST_PART_BYTES
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.parties import peers
from llmos.parties.authority import PartyAuthority
from llmos.parties.door import Door
from llmos.parties.tls import server_context
from llmos.server import party
from llmos.server.binding import bind
from llmos.server.headers import identify
from llmos.server.limits import limit_concurrency
from llmos.server.listener import base_url, make_server
from llmos.server.party import PeerProtocol, peer_certificate
from llmos.server.rendering import render_errors
from llmos.workflows import sole_process
from llmos.workflows.coordinate import Coordinator
from llmos.workflows.parts import Parts

POLL_S: Final = 10.0  # how long a site's question waits for news
TICK_S: Final = 0.5
MAX_SITE_REQUESTS: Final = 256  # each site has one question open, and sends beside it
_LOG: Final = logging.getLogger("llmos.server")
_MOST_JSON_BYTES: Final = 1 << 16


class Changes:
    """Wakes those who wait for news; `notify` may be called from any thread."""

    def __init__(self) -> None:
        """Begin without news."""
        self._event = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def notify(self) -> None:
        """Wake everybody who waits."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    def next(self) -> asyncio.Event:
        """Return what is set at the next news; call it inside the loop."""
        self._loop = asyncio.get_running_loop()
        return self._event

    def _wake(self) -> None:
        event, self._event = self._event, asyncio.Event()
        event.set()


def serve_coordinator(
    parts: Parts,
    ca: PartyAuthority,
    who: Principal,
    *,
    host: str,
    port: int,
    on_ready: Callable[[str], None],
    tell: Callable[[str], None],
) -> None:
    """Let invited sites join, and run federated jobs with them, until SIGINT or SIGTERM.

    Raises:
        ConfigError: the address cannot be bound.
        JobBusy: another process of this home is its coordinator.
        PermissionDenied: policy forbids the principal to serve, to admit or to coordinate.
    """
    kernel, changes = ca.kernel, Changes()
    kernel.monitor.authorize(who, Action.COORDINATE, kernel.home)
    context = server_context(Door(ca, who).terms, optional=True)
    with sole_process.as_coordinator(kernel), bind(host, port) as listening:
        details = {"host": host, "coordinates": ca.organisation}
        with kernel.monitor.act(who, Action.SERVE, kernel.home, details=details):
            pass
        coordinator = Coordinator(who, parts, tell=tell, changed=changes.notify)
        app = build_app(coordinator, ca, who, changes)
        url = base_url(listening, host, secure=True)
        server = make_server(app, context, lambda: on_ready(url), protocol=PeerProtocol)
        ended = threading.Event()
        clock = threading.Thread(target=_tick, args=(coordinator, ended), name="clock")
        clock.start()
        try:
            server.run(sockets=[listening])
        finally:
            ended.set()
            clock.join()


def build_app(
    coordinator: Coordinator, ca: PartyAuthority, who: Principal, changes: Changes
) -> Starlette:
    """Return the door at which parties join, with the coordinator's routes beside it.

    The door reads small bodies only; the coordinator's routes know what they expect of whom.
    """
    app = Starlette(routes=Desk(coordinator, ca, who, changes).routes)
    sites: ASGIApp = limit_concurrency(app.router, MAX_SITE_REQUESTS)
    joining = party.limited(Starlette(routes=party.routes(ca, who)).router)

    async def chosen(scope: Scope, receive: Receive, send: Send) -> None:
        federated = str(scope["path"]).startswith("/federation/")
        await (sites if federated else joining)(scope, receive, send)

    app.middleware_stack = identify(render_errors(chosen))
    return app


def _tick(coordinator: Coordinator, ended: threading.Event) -> None:
    """Look at jobs and deadlines until the server ends; what fails is tried again."""
    while not ended.wait(TICK_S):
        try:
            coordinator.tick()
        except LlmosError as error:
            _LOG.error("the coordinator's clock: %s", error.message)


@dataclass(frozen=True, slots=True)
class Desk:
    """The routes' handlers of one coordinator."""

    coordinator: Coordinator
    ca: PartyAuthority
    who: Principal
    changes: Changes

    @property
    def routes(self) -> list[Route]:
        """Return the routes: all that a site can ask for."""
        job = "/federation/jobs/{job}"
        number = "{round:int}/{attempt:int}/{phase}"
        return [
            Route("/federation/keys", self.keys),
            Route("/federation/poll", self.poll, methods=["POST"]),
            Route(f"{job}/answer", self.answer, methods=["POST"]),
            Route(f"{job}/statement", self.statement, methods=["POST"]),
            Route(f"{job}/weights/{{digest}}", self.weights),
            Route(f"{job}/rounds/{number}", self.message, methods=["POST"]),
        ]

    async def site_of(self, request: Request) -> str:
        """Return who calls; the handshake has checked the certificate and its revocation."""
        certificate, at = peer_certificate(request.scope), datetime.now(UTC)

        def named() -> str:
            return peers.verify(certificate, (self.ca.anchor(self.who, at),), at).uri

        return await run_in_threadpool(named)

    async def keys(self, request: Request) -> Response:
        """Show this home's public keys."""
        await self.site_of(request)
        return PlainTextResponse(self.ca.kernel.public_keys)

    async def poll(self, request: Request) -> Response:
        """Answer when there is something new for a site, or after `POLL_S`."""
        site = await self.site_of(request)
        asked = await read_json(request)
        until = asyncio.get_running_loop().time() + POLL_S
        while True:
            news = self.changes.next()
            version = self.coordinator.version
            now = (self.coordinator.instance, version)
            left = until - asyncio.get_running_loop().time()
            if (asked.get("instance"), asked.get("seen")) != now or left <= 0:
                break
            try:
                await asyncio.wait_for(news.wait(), left)
            except TimeoutError:
                break
        instructions = await run_in_threadpool(self.coordinator.instructions, site)
        answer = {"instance": now[0], "version": version, "instructions": instructions}
        return JSONResponse(answer)

    async def answer(self, request: Request) -> Response:
        """Take a site's yes or no to a job."""
        site = await self.site_of(request)
        envelope = await read_json(request)
        job = str(request.path_params["job"])
        await run_in_threadpool(self.coordinator.answer, site, job, envelope)
        return Response(status_code=200)

    async def statement(self, request: Request) -> Response:
        """Take what a site states after a job."""
        site = await self.site_of(request)
        part = await read_json(request, LARGEST_PART_BYTES)
        job = str(request.path_params["job"])
        await run_in_threadpool(self.coordinator.statement, site, job, part)
        return Response(status_code=200)

    async def weights(self, request: Request) -> Response:
        """Give the global weights that a task names."""
        site = await self.site_of(request)
        job, digest = (str(request.path_params[name]) for name in ("job", "digest"))
        content = await run_in_threadpool(self.coordinator.weights, site, job, digest)
        return Response(content, media_type="application/octet-stream")

    async def message(self, request: Request) -> Response:
        """Take a site's part of a round."""
        site = await self.site_of(request)
        params = request.path_params
        job = str(params["job"])
        body = await read_message(request, self.coordinator, site, job)
        number, attempt = int(params["round"]), int(params["attempt"])
        await run_in_threadpool(
            self.coordinator.receive, site, job, number, attempt, str(params["phase"]), body
        )
        return Response(status_code=200)


async def read_message(request: Request, coordinator: Coordinator, site: str, job: str) -> bytes:
    """Read a site's message for a round, which may be as long as the round says.

    Raises:
        UnknownJob: the site has no such job.
        UpdateRefused: it is longer; the site is named in the log.
    """
    largest = await run_in_threadpool(coordinator.largest_body, site, job)
    try:
        return await read_body(request, largest)
    except RequestTooLarge as error:
        await run_in_threadpool(coordinator.refuse, site, job, error.message)
        raise


async def read_body(request: Request, largest: int) -> bytes:
    """Read a body of at most `largest` bytes; a longer one is not read to its end.

    Raises:
        RequestTooLarge: it is longer.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > largest:
            raise RequestTooLarge(f"the message is larger than the expected {largest} bytes")
        parts.append(part)
    return b"".join(parts)


async def read_json(request: Request, largest: int = _MOST_JSON_BYTES) -> dict[str, Any]:
    """Read a small JSON object.

    Raises:
        RequestTooLarge: it is too long.
        RequestError: it is none.
    """
    try:
        value = json.loads(await read_body(request, largest))
    except ValueError as error:
        raise RequestError("the body is not JSON") from error
    if not isinstance(value, dict):
        raise RequestError("the body is not a JSON object")
    return value
