"""A client that calls an ASGI application directly."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message

HTTP: dict[str, Any] = {
    "type": "http",
    "method": "GET",
    "path": "/v1/models",
    "headers": [],
    "scheme": "http",
    "query_string": b"",
}


@dataclass
class Sent:
    """What an application sent; the client disconnects after its last message."""

    messages: list[Message] = field(default_factory=list)

    @classmethod
    def by(cls, app: ASGIApp, scope: dict[str, Any], body: Sequence[bytes] = (b"",)) -> Sent:
        sent = cls()
        asyncio.run(sent.call(app, scope, body))
        return sent

    async def call(self, app: ASGIApp, scope: dict[str, Any], body: Sequence[bytes]) -> None:
        waiting = [
            {"type": "http.request", "body": part, "more_body": index + 1 < len(body)}
            for index, part in enumerate(body)
        ]

        async def receive() -> Message:
            return waiting.pop(0) if waiting else {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            self.messages.append(message)

        await app(scope, receive, send)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}
