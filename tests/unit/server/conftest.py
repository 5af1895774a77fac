"""TLS for a server on this machine."""

from __future__ import annotations

import pytest
from tests.loopback import make_tls_files

from llmos.server.binding import TlsFiles


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return make_tls_files(tmp_path_factory.mktemp("tls"))
