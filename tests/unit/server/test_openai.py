"""What shows only when the application is called directly; see also integration/test_server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import torch
from starlette.types import ASGIApp, Message
from tests.conftest import ServedHome
from tests.databases import allow, refuse
from tests.unit.server.asgi import HTTP, Sent

from llmos.models.runtimes import Runtimes
from llmos.server.app import build_app

SECRET = "Maria has asthma"


@pytest.fixture(scope="module")
def token(served_home: ServedHome) -> str:
    return served_home.key("app", "developer")


@pytest.fixture(scope="module")
def served(served_home: ServedHome) -> tuple[ASGIApp, Runtimes]:
    runtimes = Runtimes(served_home.parts.registry, torch.device("cpu"))
    return build_app(served_home.parts, runtimes), runtimes


def request(token: str) -> dict[str, Any]:
    headers = [(b"authorization", f"Bearer {token}".encode())]
    return {**HTTP, "method": "POST", "path": "/v1/chat/completions", "headers": headers}


def body(**options: Any) -> bytes:
    messages = [{"role": "user", "content": SECRET}]
    return json.dumps({"model": "tiny", "messages": messages, "max_tokens": 9, **options}).encode()


async def present(app: ASGIApp, scope: dict[str, Any], content: bytes) -> Sent:
    """Call as a client that stays until it has everything."""
    sent, waiting = Sent(), [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> Message:
        if waiting:
            return waiting.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.messages.append(message)

    await app(scope, receive, send)
    return sent


def text_of(sent: Sent) -> str:
    return b"".join(message.get("body", b"") for message in sent.messages).decode()


class Break:
    """Lets a model fail at its third token, with the prompt in the message."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError(SECRET)


@pytest.mark.parametrize("stream", [True, False])
def test_a_failure_in_the_middle_is_told_without_detail_and_recorded(
    served: tuple[ASGIApp, Runtimes],
    token: str,
    served_home: ServedHome,
    stream: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app, runtimes = served
    asyncio.run(present(app, request(token), body()))
    (runtime,) = runtimes._kept.values()
    # a random model may end an answer before it fails
    monkeypatch.setattr(runtime, "_end_tokens", frozenset())
    handle = runtime._loaded.model.register_forward_pre_hook(Break())
    try:
        sent = asyncio.run(present(app, request(token), body(stream=stream)))
    finally:
        handle.remove()
    text = text_of(sent)
    assert '"type":"server_error"' in text
    assert SECRET not in text + caplog.text
    assert "RuntimeError" in caplog.text
    assert "[DONE]" not in text
    assert sent.status == (200 if stream else 500)
    assert served_home.records("chat")[-1]["details"]["completion_tokens"] == 2


def test_an_answer_whose_client_left_before_it_began_is_closed(
    served: tuple[ASGIApp, Runtimes], token: str, served_home: ServedHome
) -> None:
    before = len(served_home.records("chat"))
    Sent.by(served[0], request(token), [body(stream=True)])
    records = served_home.records("chat")
    assert len(records) == before + 2
    assert records[-1]["details"]["finish_reason"] == "unfinished"


def test_an_answer_whose_client_stops_reading_and_leaves_is_closed(
    served: tuple[ASGIApp, Runtimes], token: str, served_home: ServedHome
) -> None:
    before = len(served_home.records("chat"))

    async def scenario() -> None:
        blocked, waiting = asyncio.Event(), [{"type": "http.request", "body": body(stream=True)}]

        async def receive() -> Message:
            if waiting:
                return waiting.pop()
            await blocked.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                blocked.set()
                await asyncio.Event().wait()

        await served[0](request(token), receive, send)

    asyncio.run(scenario())
    records = served_home.records("chat")
    assert len(records) == before + 2
    assert records[-1]["details"]["completion_tokens"] == 0


def test_no_end_is_told_without_its_record(
    served: tuple[ASGIApp, Runtimes],
    token: str,
    served_home: ServedHome,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The log becomes unwritable while the model is at work."""
    app, runtimes = served
    store = served_home.parts.kernel.store
    asyncio.run(present(app, request(token), body()))
    (runtime,) = runtimes._kept.values()
    monkeypatch.setattr(runtime, "_end_tokens", frozenset())

    locked: list[bool] = []

    def lock_the_log(*_: Any) -> None:
        with store.transaction() as conn:
            if not locked:
                refuse(conn, "INSERT", "log_entries")
                locked.append(True)

    handle = runtime._loaded.model.register_forward_pre_hook(lock_the_log)
    try:
        streamed = text_of(asyncio.run(present(app, request(token), body(stream=True))))
    finally:
        handle.remove()
        with store.transaction() as conn:
            allow(conn, "log_entries")
    assert '"content":' in streamed
    assert "[DONE]" not in streamed
    assert '"finish_reason":"length"' not in streamed
    assert '"type":"server_error"' in streamed
