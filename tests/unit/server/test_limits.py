from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response
from tests.unit.server.asgi import HTTP, Sent

from llmos.errors import RequestTooLarge, TooManyRequests
from llmos.server.limits import limit_body, limit_concurrency

POST = {**HTTP, "method": "POST"}


async def echo(scope: Any, receive: Any, send: Any) -> None:
    body = await Request(scope, receive).body()
    await Response(body)(scope, receive, send)


def body_of(sent: Sent) -> bytes:
    return b"".join(message.get("body", b"") for message in sent.messages)


def test_a_body_up_to_the_limit_arrives_whole() -> None:
    assert body_of(Sent.by(limit_body(echo, 6), POST, [b"abc", b"def"])) == b"abcdef"


def test_a_body_beyond_the_limit_is_refused_while_it_comes() -> None:
    with pytest.raises(RequestTooLarge, match="6 bytes"):
        Sent.by(limit_body(echo, 6), POST, [b"abc", b"def", b"g"])


def test_an_announced_body_is_refused_before_it_comes() -> None:
    scope = {**POST, "headers": [(b"content-length", b"7")]}
    with pytest.raises(RequestTooLarge):
        Sent.by(limit_body(echo, 6), scope, [])


@pytest.mark.parametrize("announced", [b"-1", b"x", b"", b"1", "²".encode("latin-1")])
def test_a_false_announcement_does_not_help(announced: bytes) -> None:
    scope = {**POST, "headers": [(b"content-length", announced)]}
    with pytest.raises(RequestTooLarge):
        Sent.by(limit_body(echo, 6), scope, [b"abcdefg"])


def test_only_so_many_posts_run_at_a_time_and_a_failed_one_makes_room() -> None:
    release, started = asyncio.Event(), asyncio.Event()

    async def wait(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/fails":
            raise ValueError
        if scope["path"] == "/waits":
            started.set()
            await release.wait()
        await Response()(scope, receive, send)

    app = limit_concurrency(wait, 1)

    async def call(**changes: Any) -> int:
        sent = Sent()
        await sent.call(app, {**POST, **changes}, [b""])
        return sent.status

    async def scenario() -> None:
        with pytest.raises(ValueError):  # noqa: PT011
            await call(path="/fails")
        first = asyncio.create_task(call(path="/waits"))
        await started.wait()
        with pytest.raises(TooManyRequests):
            await call()
        assert await call(method="GET") == 200
        release.set()
        assert await first == 200
        assert await call() == 200

    asyncio.run(scenario())
