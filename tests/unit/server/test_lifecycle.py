from __future__ import annotations

import ssl
import threading
from dataclasses import replace

import httpx
import pytest
from sqlalchemy import select, update
from starlette.responses import PlainTextResponse
from tests.conftest import ServedHome

from llmos.config import Config
from llmos.errors import ConfigError, PermissionDenied, TamperedLog
from llmos.kernel.schema import log_entries
from llmos.server.binding import TlsFiles, bind
from llmos.server.lifecycle import serve_system
from llmos.server.listener import base_url, make_server
from llmos.system import System
from llmos.workflows.parts import Parts

HELLO = PlainTextResponse("hello")


@pytest.mark.parametrize(
    ("host", "with_tls", "expected"),
    [
        ("127.0.0.1", False, "http://127.0.0.1:"),
        ("127.0.0.1", True, "https://127.0.0.1:"),
        ("::1", False, "http://[::1]:"),
    ],
)
def test_the_url_has_the_real_port(tls: TlsFiles, host: str, with_tls: bool, expected: str) -> None:
    with bind("127.0.0.1", 0) as listening:
        url = base_url(listening, host, secure=with_tls)
        assert url == f"{expected}{listening.getsockname()[1]}"


def test_a_server_with_tls_answers_over_tls_only(tls: TlsFiles) -> None:
    ready = threading.Event()
    with bind("127.0.0.1", 0) as listening:
        server = make_server(HELLO, tls, ready.set)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            assert ready.wait(30)
            url = base_url(listening, "127.0.0.1", secure=True)
            context = ssl.create_default_context(cafile=str(tls.certificate))
            assert httpx.get(url, verify=context).text == "hello"
            with pytest.raises(httpx.TransportError):
                httpx.get(url.replace("https", "http"))
        finally:
            server.should_exit = True
            thread.join()


def never(_url: str) -> None:
    pytest.fail("the server started")


def test_a_server_in_the_clear_is_not_bound_beyond_loopback(served_home: ServedHome) -> None:
    with pytest.raises(ConfigError, match="no TLS files"):
        serve_system(System(served_home.parts), host="192.0.2.1", port=0, on_ready=never)


def test_serving_is_decided_by_policy_and_recorded(served_home: ServedHome) -> None:
    kernel = served_home.parts.kernel
    served_home.key("visitor", "developer")
    config = kernel.config.model_copy(update={"principal": "visitor"})
    visiting = System(replaced(served_home, config))
    with pytest.raises(PermissionDenied):
        serve_system(visiting, port=0, on_ready=never)
    assert served_home.records("serve")[-1]["outcome"] == "denied"


def test_a_server_does_not_start_on_a_log_with_a_changed_entry(served_home: ServedHome) -> None:
    store, before = served_home.parts.kernel.store, served_home.records("serve")
    first = update(log_entries).where(log_entries.c.idx == 0)
    with store.transaction() as conn:
        kept = conn.execute(select(log_entries.c.data).where(log_entries.c.idx == 0)).scalar_one()
        conn.execute(first.values(data=kept + b" "))
    try:
        with pytest.raises(TamperedLog):
            serve_system(System(served_home.parts), port=0, on_ready=never)
    finally:
        with store.transaction() as conn:
            conn.execute(first.values(data=kept))
    assert served_home.records("serve") == before


def replaced(home: ServedHome, config: Config) -> Parts:
    return replace(home.parts, kernel=replace(home.parts.kernel, config=config))
