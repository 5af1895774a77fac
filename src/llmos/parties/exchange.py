"""HTTP calls of a party to the door of a CA: the handshake is over before anything is sent."""

from __future__ import annotations

import json
import ssl
from http.client import HTTPException, HTTPSConnection, RemoteDisconnected
from typing import Final
from urllib.parse import urlsplit

from llmos.errors import CertificateRefused, ConfigError, JoinRefused, LlmosError, NetworkError

TIMEOUT_S: Final = 30.0
_LARGEST_ANSWER_BYTES: Final = 1 << 20
_OK: Final = 200
_SERVER_FAULT: Final = 500
_CRL_HAS_EXPIRED: Final = 12  # X509_V_ERR_CRL_HAS_EXPIRED of OpenSSL
_LATER: Final = frozenset({408, 429})  # nothing is wrong with the request but its time


def check_url(url: str) -> tuple[str, int]:
    """Return host and port of the URL of a door.

    Raises:
        ConfigError: it is not `https://HOST:PORT`.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or 443
    except ValueError as error:
        raise ConfigError(f"not a URL: {url!r}") from error
    if parts.scheme != "https" or not host or parts.path.strip("/") or parts.query:
        raise ConfigError(f"not the URL of a party's server: {url!r}", hint="https://HOST:PORT")
    return host, port


def call(
    url: str,
    context: ssl.SSLContext,
    path: str,
    body: bytes | None = None,
    *,
    largest_bytes: int = _LARGEST_ANSWER_BYTES,
    refused: type[LlmosError] = JoinRefused,
) -> bytes:
    """Send one request, a POST if it has a body, and return the answer's body.

    Args:
        url: of the server.
        context: who is believed to be the server, and who calls.
        path: of the request.
        body: None for a GET.
        largest_bytes: of an answer that is read.
        refused: what is raised where the server refuses the request.

    Raises:
        ConfigError: the URL is none.
        NetworkError: the server cannot be reached, has no time, or answers with a fault of its own.
        CertificateRefused: one of the two sides does not accept the other's certificate.
        JoinRefused, or `refused`: the server refuses the request; the message is its own.
    """
    host, port = check_url(url)
    connection = HTTPSConnection(host, port, context=context, timeout=TIMEOUT_S)
    try:
        connection.request("GET" if body is None else "POST", path, body=body)
        answer = connection.getresponse()
        content = answer.read(largest_bytes)
    except (ssl.SSLEOFError, RemoteDisconnected) as error:  # no alert: nobody was refused in words
        raise NetworkError(
            f"{url} closed the connection without an answer",
            hint="a server does so with a certificate that was revoked or is out of date",
        ) from error
    except ssl.SSLError as error:
        stale = getattr(error, "verify_code", None) == _CRL_HAS_EXPIRED
        raise CertificateRefused(
            f"no handshake with {url}: {error.strerror or error}",
            hint="`llmos party renew` fetches the newest revocation list"
            if stale
            else "if the alert is the server's, this home's certificate was revoked or expired",
        ) from error
    except (OSError, HTTPException) as error:
        raise NetworkError(
            f"{url} could not be reached: {error}",
            hint="its server must be running: llmos party serve",
        ) from error
    finally:
        connection.close()
    if answer.status >= _SERVER_FAULT or answer.length != 0:  # cut, too large, or unknown
        raise NetworkError(
            f"{url} gave no answer that can be used: status {answer.status}, {len(content)} bytes"
        )
    if answer.status in _LATER:
        raise NetworkError(
            f"{url} has no time: {_message(content) or f'status {answer.status}'}",
            hint="try again",
        )
    if answer.status != _OK:
        raise refused(f"{url}: {_message(content) or f'status {answer.status}'}")
    return content


def _message(content: bytes) -> str:
    """Return the message of an error body, on one printable line."""
    try:
        message = str(json.loads(content)["error"]["message"])
    except (ValueError, TypeError, LookupError):
        return ""
    return "".join(c if c.isprintable() else " " for c in message)[:500]
