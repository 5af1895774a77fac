"""The coordinator's routes over real TLS: who may call, how often, and how slowly."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from http.client import HTTPSConnection
from pathlib import Path

import pytest
from tests.coordinated import ORGANISATION, Hall, hall

from llmos.crypto.certificates import PartyId
from llmos.parties import authority
from llmos.parties.door import Door
from llmos.parties.tls import Credentials, PartyContext, Terms, client_context, server_context
from llmos.server import federation
from llmos.server.binding import bind
from llmos.server.federation import Changes, _tick, build_app
from llmos.server.listener import make_server
from llmos.server.party import PeerProtocol


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Hall]:
    with hall(tmp_path, ("east", "north", "south")) as made:
        yield made


@contextmanager
def served(hall: Hall) -> Iterator[int]:
    """Serve the routes on a free port of this machine and yield it."""
    ca, who, ready = authority.load(hall.system.kernel), hall.system.who, threading.Event()
    with bind("127.0.0.1", 0) as listening:
        context = server_context(Door(ca, who).terms, optional=True)
        app = build_app(hall.coordinator, ca, who, Changes())
        server = make_server(app, context, ready.set, protocol=PeerProtocol)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            assert ready.wait(60)
            yield int(listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()


def context_of(hall: Hall, credentials: Credentials) -> PartyContext:
    ca = authority.load(hall.system.kernel)
    anchor = ca.anchor(hall.system.who, datetime.now(UTC))
    return client_context(Terms(credentials, (anchor,), frozenset({PartyId(ORGANISATION, None)})))


@contextmanager
def connected(hall: Hall, port: int, name: str = "east") -> Iterator[HTTPSConnection]:
    """Open a connection that stays open between calls."""
    context = context_of(hall, hall.peers[name].credentials)
    connection = HTTPSConnection("127.0.0.1", port, context=context, timeout=30)
    try:
        connection.connect()
        yield connection
    finally:
        connection.close()


def polled(connection: HTTPSConnection) -> tuple[int, str]:
    """Ask for instructions; return status and code of the answer."""
    connection.request("POST", "/federation/poll", b"{}")
    answer = connection.getresponse()
    body = json.loads(answer.read())
    return answer.status, str(body.get("error", {}).get("message", ""))


def test_a_revocation_holds_on_a_connection_that_is_open(here: Hall) -> None:
    with served(here) as port, connected(here, port) as open_, connected(here, port, "north") as ok:
        assert polled(open_) == (200, "")
        assert polled(ok) == (200, "")
        opened = open_.sock
        here.revoke("east")
        status, message = polled(open_)
        assert opened is not None
        assert (status, "was revoked" in message) == (401, True)
        assert polled(ok) == (200, "")


def test_a_revocation_holds_for_a_question_that_waits(
    here: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(federation, "POLL_S", 1.0)
    with served(here) as port, connected(here, port) as waiting:
        seen = {"instance": here.coordinator.instance, "seen": here.coordinator.version}
        waiting.request("POST", "/federation/poll", json.dumps(seen))
        here.revoke("east")
        assert waiting.getresponse().status == 401


def test_a_certificate_that_runs_out_is_no_good_on_an_open_connection(here: Hall) -> None:
    ca, east = authority.load(here.system.kernel), here.peers["east"]
    key = east.credentials.key
    at, life = datetime.now(UTC) - timedelta(hours=1), timedelta(hours=1, seconds=3)
    names = PartyId(ORGANISATION, "east").names(())
    east.credentials = Credentials(ca.authority.issue(key.public_key(), names, at, life), key)
    with served(here) as port, connected(here, port) as open_:
        assert polled(open_) == (200, "")
        ends = east.credentials.certificate.not_valid_after_utc
        threading.Event().wait((ends - datetime.now(UTC)).total_seconds() + 1)
        assert polled(open_)[0] == 401


def test_a_body_that_does_not_come_is_not_waited_for(
    here: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(federation, "BODY_S", 0.3)
    context = context_of(here, here.peers["east"].credentials)
    with (
        served(here) as port,
        socket.create_connection(("127.0.0.1", port), timeout=30) as raw,
        context.wrap_socket(raw) as slow,
    ):
        head = b"POST /federation/poll HTTP/1.1\r\nHost: here\r\nContent-Length: 100\r\n\r\n{"
        slow.sendall(head)
        assert slow.recv(1 << 16).startswith(b"HTTP/1.1 408 ")


def test_a_site_has_a_few_calls_at_a_time_and_leaves_room_for_the_others(
    here: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(federation, "MAX_CALLS_OF_A_SITE", 2)
    monkeypatch.setattr(federation, "POLL_S", 3.0)
    seen = {"instance": here.coordinator.instance, "seen": here.coordinator.version}
    with served(here) as port, ExitStack() as stack:
        waiting = [stack.enter_context(connected(here, port)) for _ in range(3)]
        for connection in waiting:
            connection.request("POST", "/federation/poll", json.dumps(seen))
        other = stack.enter_context(connected(here, port, "north"))
        assert polled(other) == (200, "")
        statuses = sorted(connection.getresponse().status for connection in waiting)
        assert statuses == [200, 200, 429]


def test_the_clock_outlives_whatever_a_tick_meets(
    here: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(federation, "TICK_S", 0.01)
    ended, ticks = threading.Event(), list[int]()

    def tick() -> None:
        ticks.append(len(ticks))
        if len(ticks) == 3:
            ended.set()
        raise ValueError("what nobody thought of")

    monkeypatch.setattr(here.coordinator, "tick", tick)
    _tick(here.coordinator, ended)
    assert ticks == [0, 1, 2]
