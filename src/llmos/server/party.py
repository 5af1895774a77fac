"""The door at which parties join: `/party/authority`, `/party/crl`, `/party/join`, `/party/renew`.

A server of its own, apart from that of the models: it is shown to other organisations. As in EST
(RFC 7030) a caller joins without a certificate and renews by the one it has. Bodies are plain text:
a join is the token, a line end, and the request (PKCS#10, PEM); a renewal is the request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Final

from cryptography import x509
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmos.errors import AuthenticationError, RequestError
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.parties import admission
from llmos.parties.authority import PartyAuthority, home_of
from llmos.parties.door import Door
from llmos.parties.encoding import crl_to_pem, from_pem, to_pem
from llmos.parties.tls import server_context
from llmos.parties.tokens import JoinToken
from llmos.server.binding import bind
from llmos.server.headers import identify
from llmos.server.limits import limit_body, limit_concurrency
from llmos.server.listener import PunctualProtocol, base_url, make_server
from llmos.server.rendering import render_errors

MAX_BODY_BYTES: Final = 1 << 14
MAX_CONCURRENT_REQUESTS: Final = 16
BODY_S: Final = 10.0  # for the body of a request, which is small
MAX_STRANGERS: Final = 32  # connections of one address that show no certificate
_PEM: Final = "application/x-pem-file"
_TLS_1_3: Final = 0x0304


def serve_parties(
    ca: PartyAuthority, who: Principal, *, host: str, port: int, on_ready: Callable[[str], None]
) -> None:
    """Serve until SIGINT or SIGTERM; `on_ready` gets the URL.

    Raises:
        ConfigError: the address cannot be bound.
        PermissionDenied: policy forbids the principal to serve or to admit parties.
    """
    context = server_context(Door(ca, who).terms, optional=True)
    with bind(host, port) as listening:
        details = {"host": host, "parties": ca.organisation}
        with ca.kernel.monitor.act(who, Action.SERVE, home_of(ca.kernel), details=details):
            pass
        url = base_url(listening, host, secure=True)
        server = make_server(
            build_app(ca, who), context, lambda: on_ready(url), protocol=PeerProtocol
        )
        server.run(sockets=[listening])


def build_app(ca: PartyAuthority, who: Principal, body_s: float = BODY_S) -> Starlette:
    """Return the application over one CA; read the layers from the last line upwards."""
    app = Starlette(routes=routes(ca, who))
    app.middleware_stack = identify(render_errors(limited(app.router, body_s)))
    return app


def limited(router: ASGIApp, body_s: float = BODY_S) -> ASGIApp:
    """Return the routes of the door with what their requests may take.

    A request counts as under way when its body is here: a slow one keeps nobody else from joining.
    """
    work = limit_concurrency(router, MAX_CONCURRENT_REQUESTS)
    return limit_body(_with_body(work, body_s), MAX_BODY_BYTES)


def _with_body(app: ASGIApp, seconds: float) -> ASGIApp:
    """Read a request's body before the application is called, in time or not at all."""

    async def layer(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(seconds):
                body = await Request(scope, receive).body()
        except TimeoutError as error:
            late = HTTPStatus.REQUEST_TIMEOUT
            raise HTTPException(late, headers={"Connection": "close"}) from error
        except ClientDisconnect:
            return
        pending = [{"type": "http.request", "body": body, "more_body": False}]

        async def read() -> Message:
            return pending.pop() if pending else await receive()

        await app(scope, read, send)

    return layer


def routes(ca: PartyAuthority, who: Principal) -> list[Route]:
    """Return the routes of the door."""

    async def authority(_request: Request) -> Response:
        return Response(to_pem(ca.authority.certificate), media_type=_PEM)

    async def crl(_request: Request) -> Response:
        anchor = await run_in_threadpool(ca.anchor, who, datetime.now(UTC))
        return Response(crl_to_pem(anchor.crls[0]), media_type=_PEM)

    async def join(request: Request) -> Response:
        token, separator, asked = (await request.body()).partition(b"\n")
        if not separator:
            raise RequestError("the body is not a token, a line end and a certificate request")
        issued = await run_in_threadpool(
            admission.join,
            JoinToken.parse(token.decode("ascii", "replace")),
            asked,
            ca,
            who,
            datetime.now(UTC),
        )
        return Response(to_pem(issued), media_type=_PEM)

    async def renew(request: Request) -> Response:
        asked = await request.body()
        issued = await run_in_threadpool(
            admission.renew, peer_certificate(request.scope), asked, ca, who, datetime.now(UTC)
        )
        return Response(to_pem(issued), media_type=_PEM)

    return [
        Route("/party/authority", authority),
        Route("/party/crl", crl),
        Route("/party/join", join, methods=["POST"]),
        Route("/party/renew", renew, methods=["POST"]),
    ]


def peer_certificate(scope: Scope) -> x509.Certificate:
    """Return the certificate that the caller showed in its handshake.

    Raises:
        AuthenticationError: it showed none.
    """
    chain = scope.get("extensions", {}).get("tls", {}).get("client_cert_chain", ())
    if not chain:
        raise AuthenticationError("a party renews by showing its present certificate")
    return from_pem(chain[0])


class PeerProtocol(PunctualProtocol):
    """HTTP/1.1 that tells the application the peer's certificate, by the TLS extension of ASGI.

    Specification: https://asgi.readthedocs.io/en/latest/specs/tls.html. Who shows no certificate is
    anybody: one address has so many connections, so that it leaves some to others.
    """

    is_stranger: bool = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Put what the handshake has checked beside each request of the connection."""
        super().connection_made(transport)
        inner = self.app
        der = transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        self.is_stranger = der is None
        if self.is_stranger and self._strangers() > MAX_STRANGERS:
            transport.abort()
        chain = [] if der is None else [to_pem(x509.load_der_x509_certificate(der))]
        tls = {
            "server_cert": None,
            "client_cert_chain": chain,
            "client_cert_name": None,
            "client_cert_error": None,
            "tls_version": _TLS_1_3,
            "cipher_suite": None,
        }

        async def with_peer(scope: Scope, receive: Receive, send: Send) -> None:
            await inner({**scope, "extensions": {"tls": tls}}, receive, send)

        self.app = with_peer

    def _strangers(self) -> int:
        """Return how many connections without a certificate this one's address has."""
        address = self.client and self.client[0]
        return sum(
            one.is_stranger and (one.client and one.client[0]) == address
            for one in self.connections
            if isinstance(one, PeerProtocol)
        )
