from __future__ import annotations

import pytest
from starlette.responses import Response
from tests.unit.server.asgi import HTTP, Sent

from llmos.server.headers import identify


def test_every_response_has_its_own_id_whatever_the_client_sends() -> None:
    scope = {**HTTP, "headers": [(b"x-request-id", b"forged\r\n")]}
    ids = {Sent.by(identify(Response()), dict(scope)).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    assert all(name.startswith("req_") for name in ids)


def test_security_headers_are_always_there() -> None:
    headers = Sent.by(identify(Response()), dict(HTTP)).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert "strict-transport-security" not in headers


def test_over_tls_clients_are_told_to_stay_there() -> None:
    headers = Sent.by(identify(Response()), {**HTTP, "scheme": "https"}).headers
    assert headers["strict-transport-security"] == "max-age=31536000"


def test_other_protocols_are_refused() -> None:
    with pytest.raises(RuntimeError, match="websocket"):
        Sent.by(identify(Response()), {"type": "websocket"})
