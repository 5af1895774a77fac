"""The URL that a server tells of itself."""

from __future__ import annotations

import socket

import pytest

from llmos.server.binding import bind
from llmos.server.listener import base_url


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])  # noqa: S104 - nothing is bound
def test_a_server_at_all_addresses_is_called_by_the_machines_name(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmos.server.listener.getfqdn", lambda: "gpu.research.example")
    with bind("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        assert base_url(listening, host, secure=True) == f"https://gpu.research.example:{port}"


def test_any_other_host_is_called_as_it_was_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert base_url(listening, "::1", secure=False) == f"http://[::1]:{port}"
        assert base_url(listening, "a.example", secure=True) == f"https://a.example:{port}"
