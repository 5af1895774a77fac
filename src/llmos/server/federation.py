"""The coordinator's routes, `/federation/...`: for sites that show their certificate, nobody else.

A site asks (`poll`, answered when there is something new), answers a proposal, fetches the global
weights and sends its part of a round. There is no route by which anything could be run.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Final

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from llmos.errors import (
    AuthenticationError,
    CertificateRefused,
    LlmosError,
    RequestError,
    RequestTooLarge,
    TooManyRequests,
)
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
MAX_CALLS_OF_A_SITE: Final = 16  # some may be left of links that were cut
BODY_S: Final = 30.0  # and for each byte that is expected, at the rate below
SLOWEST_BYTES_S: Final = 1 << 16
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
    """Look at jobs and deadlines until the server ends; whatever fails is tried again."""
    while not ended.wait(TICK_S):
        try:
            coordinator.tick()
        except LlmosError as error:
            _LOG.error("the coordinator's clock: %s", error.message)
        except Exception as error:  # noqa: BLE001 - without its clock no job would ever go on
            frames = "".join(traceback.format_tb(error.__traceback__))
            _LOG.error("the coordinator's clock: %s\n%s", type(error).__name__, frames)


@dataclass(frozen=True, slots=True)
class Desk:
    """The routes' handlers of one coordinator."""

    coordinator: Coordinator
    ca: PartyAuthority
    who: Principal
    changes: Changes
    under_way: Counter[str] = field(default_factory=Counter)  # calls by site

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
        """Return who calls, if its certificate is good now: a connection outlives its handshake.

        Raises:
            AuthenticationError: it showed no certificate, or one that was revoked or is out of date
                by now.
        """
        certificate, at = peer_certificate(request.scope), datetime.now(UTC)

        def named() -> str:
            anchor = self.ca.anchor(self.who, at)
            try:
                site = peers.verify(certificate, (anchor,), at).uri
            except CertificateRefused as error:
                raise AuthenticationError(error.message) from error
            serial = certificate.serial_number
            if any(crl.get_revoked_certificate_by_serial_number(serial) for crl in anchor.crls):
                raise AuthenticationError(f"the certificate of {site} was revoked")
            return site

        return await run_in_threadpool(named)

    @asynccontextmanager
    async def call_of(self, request: Request) -> AsyncIterator[str]:
        """Yield who calls, for the time of its call.

        Raises:
            AuthenticationError: its certificate is not good now.
            TooManyRequests: so many calls of this site are under way.
        """
        site = await self.site_of(request)
        if self.under_way[site] >= MAX_CALLS_OF_A_SITE:
            raise TooManyRequests(f"{self.under_way[site]} calls of {site} are under way")
        self.under_way[site] += 1
        try:
            yield site
        finally:
            self.under_way[site] -= 1

    async def keys(self, request: Request) -> Response:
        """Show this home's public keys."""
        await self.site_of(request)
        return PlainTextResponse(self.ca.kernel.public_keys)

    async def poll(self, request: Request) -> Response:
        """Answer when there is something new for a site, or after `POLL_S`."""
        async with self.call_of(request):
            asked = await read_json(request)
            await self._news(asked)
            site = await self.site_of(request)  # it may have been revoked while it waited
            now = self.coordinator.instance, self.coordinator.version
            instructions = await run_in_threadpool(self.coordinator.instructions, site)
        answer = {"instance": now[0], "version": now[1], "instructions": instructions}
        return JSONResponse(answer)

    async def _news(self, asked: dict[str, Any]) -> None:
        """Wait until there is something that a site has not seen, `POLL_S` at most."""
        until = asyncio.get_running_loop().time() + POLL_S
        while True:
            news = self.changes.next()
            now = (self.coordinator.instance, self.coordinator.version)
            left = until - asyncio.get_running_loop().time()
            if (asked.get("instance"), asked.get("seen")) != now or left <= 0:
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), left)

    async def answer(self, request: Request) -> Response:
        """Take a site's yes or no to a job."""
        job = str(request.path_params["job"])
        async with self.call_of(request) as site:
            envelope = await read_json(request)
            await run_in_threadpool(self.coordinator.answer, site, job, envelope)
        return Response(status_code=200)

    async def statement(self, request: Request) -> Response:
        """Take what a site states after a job."""
        job = str(request.path_params["job"])
        async with self.call_of(request) as site:
            part = await read_json(request, LARGEST_PART_BYTES)
            await run_in_threadpool(self.coordinator.statement, site, job, part)
        return Response(status_code=200)

    async def weights(self, request: Request) -> Response:
        """Give the global weights that a task names."""
        job, digest = (str(request.path_params[name]) for name in ("job", "digest"))
        async with self.call_of(request) as site:
            content = await run_in_threadpool(self.coordinator.weights, site, job, digest)
        return Response(content, media_type="application/octet-stream")

    async def message(self, request: Request) -> Response:
        """Take a site's part of a round."""
        params, call = request.path_params, run_in_threadpool
        job, phase = str(params["job"]), str(params["phase"])
        async with self.call_of(request) as site:
            part = site, job, int(params["round"]), int(params["attempt"]), phase
            largest = await call(self.coordinator.largest_body, *part)
            try:
                body = await read_body(request, largest)
            except RequestTooLarge as error:
                await call(self.coordinator.refuse, site, job, error.message)
                raise
            await call(self.coordinator.receive, *part, body)
        return Response(status_code=200)


async def read_body(request: Request, largest: int) -> bytes:
    """Read a body of at most `largest` bytes; a longer one is not read to its end.

    Raises:
        RequestTooLarge: it is longer.
        HTTPException: it takes longer than a slow link needs for so many bytes (408).
    """
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_S + largest / SLOWEST_BYTES_S):
            async for part in request.stream():
                size += len(part)
                if size > largest:
                    message = f"the message is larger than the expected {largest} bytes"
                    raise RequestTooLarge(message)
                parts.append(part)
    except TimeoutError as error:
        raise HTTPException(HTTPStatus.REQUEST_TIMEOUT, headers={"Connection": "close"}) from error
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
