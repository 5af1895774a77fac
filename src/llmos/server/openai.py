"""The endpoints: models and chat completions as the `openai` client knows them."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import datetime

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.models.generation import Piece
from llmos.models.registry import ModelEntry
from llmos.models.runtimes import Runtimes
from llmos.server.rendering import error_body
from llmos.server.schema import ChatCompletionRequest, Envelope, Json, model_card
from llmos.workflows import chat
from llmos.workflows.parts import Parts

CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that left; nobody reads it


def routes(parts: Parts, runtimes: Runtimes) -> list[Route]:
    """Return the routes of the API over one home."""

    async def health(_request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def list_models(request: Request) -> Response:
        entries = await run_in_threadpool(chat.usable_models, _principal(request), parts)
        return JSONResponse({"object": "list", "data": [_card(entry) for entry in entries]})

    async def retrieve_model(request: Request) -> Response:
        entry = await run_in_threadpool(
            _usable_model, request.path_params["name"], _principal(request), parts
        )
        return JSONResponse(_card(entry))

    async def create_chat_completion(request: Request) -> Response:
        body = ChatCompletionRequest.parse(await request.body())
        answer = await run_in_threadpool(
            chat.run, body.to_chat(), _principal(request), parts, runtimes
        )
        if body.stream:
            return EventStream(answer, _events(answer, body, request.state.request_id))
        return await _whole(answer, request)

    return [
        Route("/health", health),
        Route("/v1/models", list_models),
        Route("/v1/models/{name}", retrieve_model),
        Route("/v1/chat/completions", create_chat_completion, methods=["POST"]),
    ]


class EventStream(StreamingResponse):
    """Server-sent events of an answer that is closed on every way out, also when nobody reads."""

    def __init__(self, answer: chat.Answer, events: AsyncGenerator[bytes]) -> None:
        """Stream the events that tell this answer."""
        super().__init__(events, media_type="text/event-stream")
        self._answer = answer
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client disconnects."""
        try:
            async with aclosing(self._events):
                await super().__call__(scope, receive, send)
        finally:
            await _close(self._answer)


async def _whole(answer: chat.Answer, request: Request) -> Response:
    made: list[Piece] = []
    async with aclosing(_pieces(answer)) as pieces:
        async for piece in pieces:
            made.append(piece)
            if await request.is_disconnected():
                return Response(status_code=CLIENT_CLOSED_REQUEST)
    text = "".join(piece.text for piece in made)
    return JSONResponse(Envelope(answer.entry).completion(text, made[-1]))


async def _events(
    answer: chat.Answer, body: ChatCompletionRequest, request_id: str
) -> AsyncGenerator[bytes]:
    envelope = Envelope(answer.entry)
    try:
        async with aclosing(_pieces(answer)) as pieces:
            yield _event(envelope.chunk({"role": "assistant", "content": "", "refusal": None}))
            async for piece in pieces:
                if piece.text:
                    yield _event(envelope.chunk({"content": piece.text}))
        yield _event(envelope.chunk({}, piece.finish_reason))  # an answer has one piece at least
        if body.wants_usage:
            yield _event(envelope.usage_chunk(piece))
        yield b"data: [DONE]\n\n"
    except Exception as error:  # noqa: BLE001 - the status is sent; only an event can tell
        yield _event(error_body(error, request_id))


async def _pieces(answer: chat.Answer) -> AsyncGenerator[Piece]:
    """Make the answer's tokens in worker threads; its record is written before its end is told."""
    try:
        while (piece := await run_in_threadpool(next, answer, None)) is not None:
            yield piece
    finally:
        await _close(answer)


async def _close(answer: chat.Answer) -> None:
    with anyio.CancelScope(shield=True):
        await run_in_threadpool(answer.close)


def _usable_model(name: str, who: Principal, parts: Parts) -> ModelEntry:
    entry = parts.registry.model(name)
    parts.kernel.monitor.authorize(who, Action.CHAT, entry.resource)
    return entry


def _card(entry: ModelEntry) -> Json:
    return model_card(entry, int(datetime.fromisoformat(entry.created_at).timestamp()))


def _principal(request: Request) -> Principal:
    principal: Principal = request.state.principal
    return principal


def _event(data: Json) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
