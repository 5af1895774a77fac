from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from llmos.errors import ConfigError
from llmos.server.binding import TlsFiles, bind, check_binding, tls_files


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_loopback_may_be_in_the_clear(host: str) -> None:
    check_binding(host, None)


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "::", "192.168.1.5", "", "x.org", "localhost.x.org", "127.0.0.1.x"],  # noqa: S104
)
def test_every_other_address_needs_tls(host: str, tls: TlsFiles) -> None:
    with pytest.raises(ConfigError, match="no TLS files") as caught:
        check_binding(host, None)
    assert "--tls-cert" in caught.value.hint
    check_binding(host, tls)


def test_a_certificate_and_its_key_are_accepted(tls: TlsFiles) -> None:
    assert tls_files(tls.certificate, tls.private_key) == tls
    assert tls_files(None, None) is None


def test_one_file_alone_is_refused(tls: TlsFiles) -> None:
    for pair in ((tls.certificate, None), (None, tls.private_key)):
        with pytest.raises(ConfigError, match="together"):
            tls_files(*pair)


def test_files_that_do_not_fit_are_refused(tls: TlsFiles, tmp_path: Path) -> None:
    locked = tmp_path / "locked.key"
    key = serialization.load_pem_private_key(tls.private_key.read_bytes(), None)
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"passphrase"),
        )
    )
    for private_key in (tls.certificate, tmp_path / "absent", locked):
        with pytest.raises(ConfigError, match="not a certificate and its key"):
            tls_files(tls.certificate, private_key)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_port_zero_is_some_free_port(host: str) -> None:
    with bind(host, 0) as listening:
        assert listening.getsockname()[1] > 0


def test_a_port_in_use_is_named() -> None:
    with bind("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}") as caught:
            bind("127.0.0.1", port)
    assert "--port" in caught.value.hint


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_of_another_machine_is_named(host: str) -> None:
    with pytest.raises(ConfigError, match="cannot listen") as caught:
        bind(host, 0)
    assert "--host" in caught.value.hint
