"""The HTTP server itself: how uvicorn is configured, tells that it is ready, and ends."""

from __future__ import annotations

import signal
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from socket import socket
from typing import Final

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from llmos.server.binding import TlsFiles

SHUTDOWN_GRACE_S: Final = 10  # answers still under way after this are cut off


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
    protocol: type[H11Protocol] = H11Protocol,
) -> Server:
    """Configure the server: HTTP/1.1, no access log, no headers that name its software."""
    files = tls if isinstance(tls, TlsFiles) else None
    config = uvicorn.Config(
        app,
        loop="asyncio",
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
    """Return the URL of a listening socket, with the port that it really has."""
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if secure else 'http'}://{shown}:{listening.getsockname()[1]}"
