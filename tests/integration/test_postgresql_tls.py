"""A home whose PostgreSQL is reached over the network: by TLS, and only from the named server."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import text
from tests import postgresql
from tests.loopback import make_tls_files

from llmos import config as configuration
from llmos.errors import StorageError
from llmos.kernel import kernel as kernels
from llmos.kernel.kernel import Kernel

PASSWORD = "p@ss/w:rd"
IN_URL = "p%40ss%2Fw%3Ard"
# Over TCP only by TLS and with a password; by the socket as the session's server.
HBA = "local all all trust\nhostssl all llmos 127.0.0.1/32 scram-sha-256\n"


@dataclass(frozen=True)
class Guarded:
    """A server that takes passwords by TLS, and what proves its name."""

    port: int
    root: Path  # certificate that a client must have
    stranger: Path  # a certificate of the same name under another key

    def url(self, host: str, **query: object) -> str:
        asked = "&".join(f"{name}={value}" for name, value in query.items())
        return f"postgresql://llmos:{IN_URL}@{host}:{self.port}/llmos?{asked}"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    if not postgresql.is_installed():
        pytest.skip(postgresql.MISSING)
    root, stranger = (make_tls_files(tmp_path_factory.mktemp(name)) for name in ("ca", "other"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (
        tempfile.TemporaryDirectory(prefix="llmos-pg-") as folder,
        postgresql.running(Path(folder)) as server,
    ):
        sql = f"ALTER ROLE llmos PASSWORD '{PASSWORD}'"
        psql = [str(postgresql.PROGRAMS / "psql"), "-h", folder, "-U", "postgres", "-c", sql]
        postgresql.run_as_postgres(psql)
        server.stop()
        (server.data / "pg_hba.conf").write_text(HBA)
        for source, name in ((root.certificate, "server.crt"), (root.private_key, "server.key")):
            shutil.copyfile(source, server.data / name)
            (server.data / name).chmod(0o600)
            if os.getuid() == 0:
                shutil.chown(server.data / name, "postgres", "postgres")
        server.start(f"-c ssl=on -c listen_addresses=127.0.0.1 -c port={port}")
        yield Guarded(port, root.certificate, stranger.certificate)


def made(home: Path, url: str) -> Kernel:
    return kernels.create(configuration.load(home=home, database_url=url))


def test_a_home_is_made_over_tls_with_a_server_that_proves_its_name(
    guarded: Guarded, tmp_path: Path
) -> None:
    kernel = made(tmp_path / "home", guarded.url("127.0.0.1", sslrootcert=guarded.root))
    encrypted = "SELECT ssl, version FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
    with kernel.store.read() as conn:
        assert conn.execute(text(encrypted)).one() == (True, "TLSv1.3")
    assert kernel.auditlog.verify().size == 1


@pytest.mark.parametrize(
    ("host", "root", "said"),
    [
        ("127.0.0.1", "stranger", "certificate verify failed"),
        ("localhost", "root", "does not match host name"),
        ("127.0.0.1", "missing", "does not exist"),
    ],
)
def test_a_server_that_does_not_prove_its_name_gets_no_password_and_makes_no_home(
    guarded: Guarded, tmp_path: Path, host: str, root: str, said: str
) -> None:
    trusted = getattr(guarded, root, tmp_path / "missing.pem")
    with pytest.raises(StorageError, match=said) as refused:
        made(tmp_path / "home", guarded.url(host, sslrootcert=trusted))
    assert not list(tmp_path.iterdir())
    for written in (PASSWORD, IN_URL):
        assert written not in str(refused.value)


def test_without_tls_the_server_lets_nobody_in(guarded: Guarded, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no encryption"):
        made(tmp_path / "home", guarded.url("127.0.0.1", sslmode="disable"))
    assert not list(tmp_path.iterdir())


def test_a_server_without_tls_is_refused_although_it_would_let_everyone_in(
    tmp_path: Path, guarded: Guarded
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (
        tempfile.TemporaryDirectory(prefix="llmos-pg-") as folder,
        postgresql.running(Path(folder)) as server,
    ):
        server.stop()
        server.start(f"-c listen_addresses=127.0.0.1 -c port={port}")
        url = f"postgresql://llmos@127.0.0.1:{port}/llmos?sslrootcert={guarded.root}"
        with pytest.raises(StorageError, match="server does not support SSL"):
            made(tmp_path / "home", url)
        assert not list(tmp_path.iterdir())
        assert made(tmp_path / "home", f"{url}&sslmode=disable").auditlog.verify().size == 1
