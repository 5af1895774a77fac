"""Headers that every response carries: the request's id, and rules for whoever shows it."""

from __future__ import annotations

import secrets

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ALWAYS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_HSTS = "max-age=31536000"


def identify(app: ASGIApp) -> ASGIApp:
    """Give each request an id of our own, and each response its id and the security headers."""

    async def layer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # no lifespan and no websockets here
            raise RuntimeError(f"unexpected ASGI scope {scope['type']!r}")
        request_id = f"req_{secrets.token_hex(12)}"
        scope["state"] = {"request_id": request_id}

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                headers.update(_ALWAYS)
                if scope["scheme"] == "https":
                    headers["Strict-Transport-Security"] = _HSTS
            await send(message)

        await app(scope, receive, labelled)

    return layer
