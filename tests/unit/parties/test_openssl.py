"""OpenSSL's own command line judges what we make."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from tests.parties import NOW, Pki

from llmos.crypto.certificates import CRL_LIFE
from llmos.parties.encoding import key_bytes, serial_of
from llmos.parties.peers import Anchor
from llmos.parties.tls import Credentials, server_context

pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="there is no openssl command to ask"
)
PKI = Pki()
SITE = PKI.credentials("site")


def run(*arguments: str | Path, said: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["openssl", *map(str, arguments)],
        input=said,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def written(folder: Path, anchor: Anchor, leaf: Credentials = SITE) -> tuple[Path, Path]:
    (folder / "bundle.pem").write_bytes(anchor.pem)
    (folder / "leaf.pem").write_bytes(leaf.certificate.public_bytes(Encoding.PEM))
    return folder / "bundle.pem", folder / "leaf.pem"


@pytest.mark.parametrize("purpose", ["sslclient", "sslserver"])
def test_verify_accepts_certificate_and_list(tmp_path: Path, purpose: str) -> None:
    bundle, leaf = written(tmp_path, PKI.anchor())
    strict = ("-x509_strict", "-crl_check", "-purpose", purpose)
    said = run("verify", *strict, "-CAfile", bundle, "-CRLfile", bundle, leaf)
    assert (said.returncode, said.stdout) == (0, f"{leaf}: OK\n")


@pytest.mark.parametrize(
    ("anchor", "says"),
    [
        (PKI.anchor(SITE), "certificate revoked"),
        (PKI.anchor(at=NOW - CRL_LIFE), "CRL has expired"),
    ],
)
def test_verify_refuses(tmp_path: Path, anchor: Anchor, says: str) -> None:
    bundle, leaf = written(tmp_path, anchor)
    said = run("verify", "-crl_check", "-CAfile", bundle, "-CRLfile", bundle, leaf)
    assert said.returncode != 0
    assert says in said.stderr


def test_the_text_says_what_the_profile_says(tmp_path: Path) -> None:
    _, leaf = written(tmp_path, PKI.anchor())
    text = run("x509", "-in", leaf, "-noout", "-text").stdout
    for line in (
        "Signature Algorithm: ecdsa-with-SHA256",
        "Public-Key: (256 bit)",
        "X509v3 Basic Constraints: critical\n                CA:FALSE",
        "X509v3 Key Usage: critical\n                Digital Signature\n",
        "TLS Web Client Authentication, TLS Web Server Authentication",
        "URI:spiffe://hospital.example/party/site\n",
        "X509v3 Subject Key Identifier",
        "X509v3 Authority Key Identifier",
    ):
        assert line in text, line
    serial = run("x509", "-in", leaf, "-noout", "-serial").stdout.strip().removeprefix("serial=")
    assert int(serial, 16) == int(serial_of(SITE.certificate), 16) < 2**159
    life = SITE.certificate.not_valid_after_utc - SITE.certificate.not_valid_before_utc
    assert life == timedelta(days=30, minutes=5)


@pytest.mark.parametrize("revoked", [False, True])
def test_s_client_talks_to_our_server(tmp_path: Path, revoked: bool) -> None:
    anchor = PKI.anchor(SITE) if revoked else PKI.anchor()
    bundle, leaf = written(tmp_path, PKI.anchor())
    (tmp_path / "key.der").write_bytes(key_bytes(SITE.key))
    server = server_context(lambda: PKI.terms(PKI.credentials("hub"), "site", anchor=anchor))
    refused: list[ssl.SSLError] = []

    def serve(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            try:
                with server.wrap_socket(connection, server_side=True) as accepted:
                    accepted.sendall(b"welcome")
            except ssl.SSLError as error:
                refused.append(error)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        port = listening.getsockname()[1]
        said = run(
            "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_3", "-quiet",
            "-verify_return_error", "-x509_strict", "-crl_check",
            "-CAfile", bundle, "-CRL", bundle,
            "-cert", leaf, "-key", tmp_path / "key.der", "-keyform", "DER",
        )  # fmt: skip
        thread.join(60)
    assert ("welcome" in said.stdout) is not revoked, said.stderr
    assert ["certificate revoked" in str(error) for error in refused] == [True] * revoked
