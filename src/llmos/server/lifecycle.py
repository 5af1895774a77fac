"""The server's life: bind, tell that it is ready, serve, and end its answers when asked to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING, Final

import uvicorn
from starlette.types import ASGIApp

from llmos.kernel.policy import Action
from llmos.models.loading import resolve_device
from llmos.models.runtimes import Runtimes
from llmos.server.app import build_app
from llmos.server.binding import TlsFiles, bind, check_binding, tls_files

if TYPE_CHECKING:
    from llmos.system import System

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


def serve_system(
    system: System,
    *,
    host: str | None = None,
    port: int | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    on_ready: Callable[[str], None],
) -> None:
    """Serve a home's models until SIGINT or SIGTERM; `on_ready` gets the URL.

    Raises:
        ConfigError: the address would show keys and prompts in the clear, or cannot be bound.
        PermissionDenied: policy forbids the principal to serve.
    """
    parts = system.parts
    kernel = parts.kernel
    host = kernel.config.host if host is None else host
    tls = tls_files(tls_cert, tls_key)
    check_binding(host, tls)
    runtimes = Runtimes(parts.registry, resolve_device(kernel.config.device))
    app = build_app(parts, runtimes)
    with bind(host, kernel.config.port if port is None else port) as listening:
        details = {"host": host, "tls": tls is not None}
        with kernel.monitor.act(kernel.principal(), Action.SERVE, kernel.home, details=details):
            pass
        url = base_url(listening, host, tls)
        make_server(app, tls, lambda: on_ready(url)).run(sockets=[listening])


def make_server(app: ASGIApp, tls: TlsFiles | None, on_ready: Callable[[], None]) -> Server:
    """Configure the server: HTTP/1.1, no access log, no headers that name its software."""
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=SHUTDOWN_GRACE_S,
        ssl_certfile=None if tls is None else tls.certificate,
        ssl_keyfile=None if tls is None else tls.private_key,
    )
    return Server(config, on_ready)


def base_url(listening: socket, host: str, tls: TlsFiles | None) -> str:
    """Return the URL of a listening socket, with the port that it really has."""
    shown = f"[{host}]" if ":" in host else host
    return f"{'http' if tls is None else 'https'}://{shown}:{listening.getsockname()[1]}"
