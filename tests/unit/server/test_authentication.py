from __future__ import annotations

from typing import Any

import pytest
from starlette.datastructures import Headers
from starlette.responses import Response
from tests.unit.server.asgi import HTTP, Sent

from llmos.errors import AuthenticationError
from llmos.kernel.identity import Principal
from llmos.server.authentication import authenticate, bearer_token

ADA = Principal("1", "ada", frozenset())


def verify(token: str) -> Principal:
    if token != "good":
        raise AuthenticationError("unknown key")
    return ADA


async def whoami(scope: Any, receive: Any, send: Any) -> None:
    name = scope["state"].get("principal", Principal("", "nobody", frozenset())).name
    await Response(headers={"name": name})(scope, receive, send)


def ask(path: str, *authorization: str) -> Sent:
    headers = [(b"authorization", value.encode()) for value in authorization]
    scope = {**HTTP, "path": path, "headers": headers, "state": {}}
    return Sent.by(authenticate(whoami, verify), scope)


def test_a_good_key_names_its_principal() -> None:
    assert ask("/v1/models", "Bearer good").headers["name"] == "ada"


@pytest.mark.parametrize("path", ["/v1/models", "/", "/health/", "//health", "/healthx", ""])
def test_without_a_key_only_health_is_open(path: str) -> None:
    assert ask("/health").headers["name"] == "nobody"
    with pytest.raises(AuthenticationError):
        ask(path)
    with pytest.raises(AuthenticationError, match="unknown key"):
        ask(path, "Bearer bad")


@pytest.mark.parametrize("value", ["Bearer t", "bearer t", "BEARER  t "])
def test_the_scheme_is_case_insensitive(value: str) -> None:
    assert bearer_token(Headers({"authorization": value})) == "t"


@pytest.mark.parametrize("value", ["", "t", "Bearer", "Bearer ", "Basic t", "Bearert"])
def test_another_header_is_no_token(value: str) -> None:
    with pytest.raises(AuthenticationError, match="needs an API key"):
        bearer_token(Headers({"authorization": value}))
