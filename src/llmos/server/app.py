"""The ASGI application: ten lines build the onion around the routes."""

from __future__ import annotations

from typing import Final

from starlette.applications import Starlette
from starlette.types import ASGIApp

from llmos.models.runtimes import Runtimes
from llmos.server import login, witness
from llmos.server.authentication import authenticate
from llmos.server.headers import identify
from llmos.server.limits import limit_body, limit_concurrency
from llmos.server.openai import routes
from llmos.server.rendering import render_errors
from llmos.workflows.parts import Parts

MAX_BODY_BYTES: Final = 1 << 20
MAX_CONCURRENT_REQUESTS: Final = 16


def build_app(
    parts: Parts,
    runtimes: Runtimes,
    *,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_concurrent_requests: int = MAX_CONCURRENT_REQUESTS,
) -> Starlette:
    """Return the application over one home; read the layers from the last line upwards.

    There is no CORS layer: a page of another origin is never allowed to read an answer.
    """
    app = Starlette(routes=[*routes(parts, runtimes), *witness.routes(parts), *login.routes(parts)])
    layer: ASGIApp = app.router
    layer = limit_concurrency(layer, max_concurrent_requests)
    layer = authenticate(layer, parts.kernel.identity.authenticate)
    layer = limit_body(layer, max_body_bytes)
    layer = render_errors(layer)
    app.middleware_stack = identify(layer)
    return app
