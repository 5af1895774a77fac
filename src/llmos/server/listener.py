"""The HTTP server itself: how uvicorn is configured, whom it waits for, how it begins and ends."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from socket import getfqdn, socket
from typing import Any, ClassVar, Final

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from llmos.server.binding import TlsFiles

SHUTDOWN_GRACE_S: Final = 10  # answers still under way after this are cut off
HANDSHAKE_S: Final = 20.0


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose servers wait for a handshake of TLS, though not for asyncio's minute."""

    async def create_server(self, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        """Listen."""
        if options.get("ssl") is not None:
            options["ssl_handshake_timeout"] = HANDSHAKE_S
        return await super().create_server(*arguments, **options)


class PunctualProtocol(H11Protocol):
    """HTTP/1.1 that hangs up on who opens a connection and does not ask, or not to the end.

    uvicorn waits without end for a first request, and for the rest of any: who opens a thousand
    connections and is silent would have all descriptors of the process.
    """

    request_s: ClassVar[float] = 20.0  # from the first moment or byte to the last header
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.request_s, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Take what came; the time of a request begins with it and ends with its last header."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.request_s, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Server(uvicorn.Server):
    """uvicorn that tells when it is ready, and returns after a signal instead of raising it."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        """Serve as configured; `on_ready` is called when connections are accepted."""
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Start, then report it."""
        await super().startup(sockets)
        self._on_ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Turn SIGINT and SIGTERM into a graceful end for the time of the block."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def make_server(
    app: ASGIApp,
    tls: TlsFiles | ssl.SSLContext | None,
    on_ready: Callable[[], None],
    *,
    protocol: type[PunctualProtocol] = PunctualProtocol,
) -> Server:
    """Configure the server: HTTP/1.1, no access log, no headers that name its software."""
    files = tls if isinstance(tls, TlsFiles) else None
    config = uvicorn.Config(
        app,
        loop=f"{__name__}:{Loop.__name__}",
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=SHUTDOWN_GRACE_S,
        ssl_certfile=None if files is None else files.certificate,
        ssl_keyfile=None if files is None else files.private_key,
        ssl_context_factory=None
        if not isinstance(tls, ssl.SSLContext)
        else (lambda _config, _default: tls),
    )
    return Server(config, on_ready)


def base_url(listening: socket, host: str, *, secure: bool) -> str:
    """Return the URL of a listening socket, with the port that it really has.

    Where it listens at all addresses it is this machine's name: none of them is one to call.
    """
    named = getfqdn() if _is_unspecified(host) else host
    shown = f"[{named}]" if ":" in named else named
    return f"{'https' if secure else 'http'}://{shown}:{listening.getsockname()[1]}"


def _is_unspecified(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return not host
