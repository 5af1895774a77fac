"""The life of the models' server: bind, record it, tell that it is ready, and serve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llmos.kernel.policy import Action
from llmos.models.devices import resolve_device
from llmos.models.runtimes import Runtimes
from llmos.server.app import build_app
from llmos.server.binding import bind, check_binding, tls_files
from llmos.server.listener import base_url, make_server

if TYPE_CHECKING:
    from llmos.system import System


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
        TamperedLog: an entry was changed that is too old for the check at every start.
    """
    parts = system.parts
    kernel = parts.kernel
    host = kernel.config.host if host is None else host
    tls = tls_files(tls_cert, tls_key)
    check_binding(host, tls)
    kernel.auditlog.verify()
    runtimes = Runtimes(parts.registry, resolve_device(kernel.config.device))
    app = build_app(parts, runtimes)
    with bind(host, kernel.config.port if port is None else port) as listening:
        details = {"host": host, "tls": tls is not None}
        with kernel.monitor.act(kernel.principal(), Action.SERVE, kernel.home, details=details):
            pass
        url = base_url(listening, host, secure=tls is not None)
        make_server(app, tls, lambda: on_ready(url)).run(sockets=[listening])
