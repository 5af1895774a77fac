"""Errors as OpenAI's error bodies; the one place of the server where they become text."""

from __future__ import annotations

import logging
import re
import traceback
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmos.errors import (
    AuthenticationError,
    InvalidField,
    LlmosError,
    PromptTooLong,
    StorageFull,
    TooManyRequests,
    UnknownModel,
)
from llmos.server.schema import Json

_LOG = logging.getLogger("llmos.server")
_NO_ROOM = (
    "the server's disk is full: nothing can be recorded, so nothing is done until its operator "
    "has freed some space"
)
_INTERNAL = int(HTTPStatus.INTERNAL_SERVER_ERROR)

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES: dict[type[LlmosError], str] = {
    AuthenticationError: "invalid_api_key",
    UnknownModel: "model_not_found",
    PromptTooLong: "context_length_exceeded",
    TooManyRequests: "rate_limit_exceeded",
}


def render_errors(app: ASGIApp) -> ASGIApp:
    """Answer every error of the layers below; what is unexpected is answered without detail."""

    async def layer(scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await app(scope, receive, watched)
        except Exception as error:  # noqa: BLE001 - the outermost border of a request
            response = error_response(error, scope["state"]["request_id"])
            if not started:  # a body that has begun can only be cut off
                await response(scope, receive, send)

    return layer


def error_response(error: Exception, request_id: str) -> JSONResponse:
    """Return the response for an error, and log those that are the server's fault."""
    status = _status(error)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if isinstance(error, AuthenticationError):
        headers["WWW-Authenticate"] = 'Bearer realm="llmos"'
    if isinstance(error, TooManyRequests):
        headers["Retry-After"] = "1"
    if isinstance(error, StorageFull):
        headers["Retry-After"] = "60"
    return JSONResponse(error_body(error, request_id), status, headers)


def error_body(error: Exception, request_id: str) -> Json:
    """Return OpenAI's error object; from status 500 on it says nothing about the inside."""
    status = _status(error)
    if status >= _INTERNAL:
        _log(error, request_id)
        message = f"the server could not answer; its log knows this as {request_id}"
        if isinstance(error, StorageFull):
            message = f"{_NO_ROOM}; its log knows this as {request_id}"
    elif isinstance(error, LlmosError):
        message = f"{error.message} ({error.hint})" if error.hint else error.message
    else:
        message = HTTPStatus(status).phrase
    kind = "server_error" if status >= _INTERNAL else _TYPES.get(status, "invalid_request_error")
    field = error.field if isinstance(error, InvalidField) else None
    return {"error": {"message": message, "type": kind, "param": field, "code": _code(error)}}


def _status(error: Exception) -> int:
    if isinstance(error, LlmosError):
        return error.http_status
    return error.status_code if isinstance(error, HTTPException) else _INTERNAL


def _code(error: Exception) -> str | None:
    if not isinstance(error, LlmosError):
        return None
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(error).__name__).lower()
    return _CODES.get(type(error), name)


def _log(error: Exception, request_id: str) -> None:
    """Log type and place of an error; messages of foreign errors may quote a prompt."""
    detail = f": {error.message}" if isinstance(error, LlmosError) else ""
    frames = "".join(traceback.format_tb(error.__traceback__))
    _LOG.error("%s failed with %s%s\n%s", request_id, type(error).__name__, detail, frames)
