from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from tests.unit.server.asgi import HTTP, Sent

from llmos import errors
from llmos.server.rendering import error_body, error_response, render_errors

SECRET = "Maria has asthma"


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (errors.AuthenticationError("who?"), 401, "authentication_error", "invalid_api_key"),
        (errors.PermissionDenied("a", "chat", "m"), 403, "permission_error", "permission_denied"),
        (errors.UnknownModel("no m"), 404, "invalid_request_error", "model_not_found"),
        (errors.PromptTooLong("long"), 400, "invalid_request_error", "context_length_exceeded"),
        (errors.RequestTooLarge("big"), 413, "invalid_request_error", "request_too_large"),
        (errors.TooManyRequests("busy"), 429, "rate_limit_error", "rate_limit_exceeded"),
        (errors.InvalidField("n", "n: 1"), 400, "invalid_request_error", "invalid_field"),
        (errors.StorageFull("full"), 507, "server_error", "storage_full"),
        (HTTPException(405), 405, "invalid_request_error", None),
        (ValueError(SECRET), 500, "server_error", None),
    ],
)
def test_each_error_has_its_status_type_and_code(
    error: Exception, status: int, kind: str, code: str | None
) -> None:
    response = error_response(error, "req_1")
    body = json.loads(bytes(response.body))["error"]
    assert (response.status_code, body["type"], body["code"]) == (status, kind, code)
    assert set(body) == {"message", "type", "param", "code"}


def test_every_llmos_error_has_a_status_that_says_error() -> None:
    def family(error: type[errors.LlmosError]) -> list[type[errors.LlmosError]]:
        return [error, *(e for child in error.__subclasses__() for e in family(child))]

    assert all(400 <= error.http_status < 600 for error in family(errors.LlmosError))


def test_the_hint_follows_the_message() -> None:
    body = error_body(errors.UnknownModel("there is no model 'x'", hint="see ls"), "req_1")
    assert body["error"]["message"] == "there is no model 'x' (see ls)"


def test_special_headers() -> None:
    unknown = error_response(errors.AuthenticationError("who?"), "req_1")
    busy = error_response(errors.TooManyRequests("busy"), "req_1")
    method = error_response(HTTPException(405, headers={"Allow": "GET"}), "req_1")
    assert unknown.headers["www-authenticate"] == 'Bearer realm="llmos"'
    assert busy.headers["retry-after"] == "1"
    assert method.headers["allow"] == "GET"


@pytest.mark.parametrize("error", [ValueError(SECRET), errors.TamperedObject(SECRET)])
def test_the_servers_own_faults_are_answered_without_detail(error: Exception) -> None:
    body = error_body(error, "req_1")
    assert SECRET not in json.dumps(body)
    assert "req_1" in body["error"]["message"]


def test_a_full_disk_is_named_because_waiting_helps() -> None:
    response = error_response(errors.StorageFull("/home/erin/kernel.db: no room"), "req_1")
    message = json.loads(bytes(response.body))["error"]["message"]
    assert message.startswith("the server's disk is full")
    assert "req_1" in message
    assert "kernel.db" not in message
    assert response.headers["retry-after"] == "60"


def raises(secret: str) -> None:
    raise ValueError(f"bad prompt: {secret}")


def test_the_log_names_type_and_place_but_not_the_text(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, logger="llmos.server"):
        try:
            raises(SECRET)
        except ValueError as error:
            error_body(error, "req_1")
        error_body(errors.UnknownModel("client's fault"), "req_2")
    assert "req_1 failed with ValueError" in caplog.text
    assert "in raises" in caplog.text
    assert SECRET not in caplog.text
    assert "req_2" not in caplog.text


async def fail_late(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    raise ValueError(SECRET)


async def fail_early(_scope: Any, _receive: Any, _send: Any) -> None:
    raise ValueError(SECRET)


def test_an_error_before_the_response_becomes_one() -> None:
    sent = Sent.by(render_errors(fail_early), {**HTTP, "state": {"request_id": "req_1"}})
    assert sent.status == 500


def test_an_error_after_the_start_cuts_the_response_off() -> None:
    sent = Sent.by(render_errors(fail_late), {**HTTP, "state": {"request_id": "req_1"}})
    assert [message["type"] for message in sent.messages] == ["http.response.start"]
