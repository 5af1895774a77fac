"""Where the server may listen: loopback in the clear, every other address only with TLS."""

from __future__ import annotations

import errno
import ipaddress
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from llmos.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """A server's certificate chain and its private key, both PEM."""

    certificate: Path
    private_key: Path


def tls_files(certificate: Path | None, private_key: Path | None) -> TlsFiles | None:
    """Return the pair of files, checked, or None when neither is given.

    Raises:
        ConfigError: only one is given, or they are not a certificate and its key.
    """
    if certificate is None and private_key is None:
        return None
    if certificate is None or private_key is None:
        raise ConfigError("a TLS certificate and its private key are given together or not at all")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            certificate,
            private_key,
            password=_no_password,
        )
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"{certificate} and {private_key} are not a certificate and its key: {error}",
            hint="give PEM files; the key must not be under a passphrase",
        ) from error
    return TlsFiles(certificate, private_key)


def check_binding(host: str, tls: TlsFiles | None) -> None:
    """Refuse to show keys and prompts to a network in the clear.

    Raises:
        ConfigError: `host` is not a loopback address and there is no TLS.
    """
    if tls is None and not _is_loopback(host):
        raise ConfigError(
            f"{host} can be reached from other machines and no TLS files are given",
            hint="give --tls-cert and --tls-key, or bind 127.0.0.1 behind a proxy of your own",
        )


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 lets the system choose.

    Raises:
        ConfigError: the address is not of this machine, is in use, or may not be bound.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror or error}",
            hint="choose another --port, 0 for any" if in_use else "choose another --host",
        ) from error


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _no_password() -> str:
    """Stop OpenSSL from asking the terminal."""
    return ""
