"""What a caller makes of the answers of a server, good and bad."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from tests.parties import NOW, Pki

from llmos.crypto.certificates import CRL_LIFE
from llmos.errors import CertificateRefused, JoinRefused, NetworkError
from llmos.parties.exchange import call
from llmos.parties.tls import client_context, introduction_context, server_context

PKI = Pki()


@contextmanager
def answering(answer: bytes, came: list[bytes] | None = None) -> Iterator[str]:
    """Serve one TLS connection that answers a request with these bytes; keep what came."""
    server = server_context(lambda: PKI.terms(PKI.credentials(None), "site"), optional=True)

    def serve(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with (
            connection,
            suppress(ssl.SSLError),  # the caller may refuse the handshake
            server.wrap_socket(connection, server_side=True) as accepted,
        ):
            request = accepted.recv(1 << 16)
            if came is not None:
                came.append(request)
            accepted.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        try:
            yield f"https://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            thread.join(60)


def http(status: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def ask(url: str) -> bytes:
    return call(url, client_context(PKI.terms(None, None)), "/party/crl")


def test_an_answer_is_its_body() -> None:
    with answering(http("200 OK", b"list")) as url:
        assert ask(url) == b"list"


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (http("500 Internal Server Error", b"{}"), "status 500"),
        (http("200 OK", bytes((1 << 20) + 1)), "status 200"),
        (b"", "closed the connection without an answer"),
        (b"nothing\r\n\r\n", "could not be reached"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nlist", "status 200, 4 bytes"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + bytes((1 << 20) + 1), "status 200, 1048576 bytes"),
    ],
)
def test_a_fault_of_the_server_is_told(answer: bytes, says: str) -> None:
    with answering(answer) as url, pytest.raises(NetworkError, match=says):
        ask(url)


def test_a_connection_that_ends_in_its_handshake_says_nothing_about_certificates() -> None:
    # a proxy whose server is gone does so, and a server that is killed
    def close(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(1 << 16)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=close, args=(listening,))
        thread.start()
        with pytest.raises(NetworkError, match="closed the connection without an answer"):
            ask(f"https://127.0.0.1:{listening.getsockname()[1]}")
        thread.join(60)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"error": {"message": "used\\u001b[2J already"}}', r": used \[2J already$"),
        (b'{"error": {"message": "%s"}}' % (b"x" * 900), ": x{500}$"),
        (b"<html>", "status 403"),
        (b"[1]", "status 403"),
        (b'{"error": {}}', "status 403"),
        (b"\xff", "status 403"),
    ],
)
def test_a_refusal_is_told_in_printable_words(body: bytes, says: str) -> None:
    with answering(http("403 Forbidden", body)) as url, pytest.raises(JoinRefused, match=says):
        ask(url)


def test_a_server_of_another_ca_gets_no_request(came: list[bytes]) -> None:
    context = client_context(Pki("bank.example").terms(None, None))
    with (
        answering(http("200 OK", b"list"), came) as url,
        pytest.raises(CertificateRefused, match="no handshake"),
    ):
        call(url, context, "/party/join", b"secret")
    assert came == []
    with answering(http("200 OK", b"list"), came) as url:
        assert call(url, introduction_context(), "/party/crl") == b"list"
    assert came[0].startswith(b"GET /party/crl ")


@pytest.fixture
def came() -> list[bytes]:
    """Return where a server keeps what came to it after a handshake."""
    return []


@pytest.mark.parametrize("status", ["408 Request Timeout", "429 Too Many Requests"])
def test_a_server_without_time_has_refused_nothing(status: str) -> None:
    body = b'{"error": {"message": "all it may"}}'
    with answering(http(status, body)) as url, pytest.raises(NetworkError, match="all it may"):
        ask(url)


def test_who_has_an_old_list_is_told_how_to_get_another() -> None:
    old = client_context(PKI.terms(None, None, anchor=PKI.anchor(at=NOW - CRL_LIFE)))
    with (
        answering(http("200 OK", b"list")) as url,
        pytest.raises(CertificateRefused, match="CRL has expired") as refused,
    ):
        call(url, old, "/party/crl")
    assert "llmos party renew" in refused.value.hint
