"""What one request, and all of them together, may take."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmos.errors import RequestTooLarge, TooManyRequests


def limit_body(app: ASGIApp, max_bytes: int) -> ASGIApp:
    """Refuse a body of more than `max_bytes`, announced or not, before it is kept in memory.

    Raises:
        RequestTooLarge: the body is larger.
    """
    error = RequestTooLarge(
        f"the request's body is larger than {max_bytes} bytes", hint="shorten the conversation"
    )

    async def layer(scope: Scope, receive: Receive, send: Send) -> None:
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > max_bytes:
            raise error
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > max_bytes:
                raise error
            return message

        await app(scope, counted, send)

    return layer


def limit_concurrency(app: ASGIApp, max_requests: int) -> ASGIApp:
    """Refuse work beyond `max_requests` POST requests at a time; reading stays possible.

    Raises:
        TooManyRequests: as many are under way.
    """
    under_way = 0

    async def layer(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal under_way
        if scope["method"] != "POST":
            await app(scope, receive, send)
            return
        if under_way >= max_requests:
            raise TooManyRequests(
                f"the server works on {under_way} requests, which is all it may",
                hint="try again after the time in Retry-After",
            )
        under_way += 1
        try:
            await app(scope, receive, send)
        finally:
            under_way -= 1

    return layer
