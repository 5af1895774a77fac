"""`POST /api/login` over a real home, called as ASGI."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tests.unit.server.asgi import HTTP, Sent

from llmos.models.runtimes import Runtimes
from llmos.server.app import build_app
from llmos.system import System

PASSWORD = "correct horse battery"


def post(system: System, body: bytes) -> Sent:
    app = build_app(
        system.parts, Runtimes(system.registry, torch.device("cpu")), max_body_bytes=2000
    )
    scope: dict[str, Any] = {**HTTP, "method": "POST", "path": "/api/login", "state": {}}
    return Sent.by(app, scope, (body,))


def said(sent: Sent) -> Any:
    return json.loads(b"".join(message.get("body", b"") for message in sent.messages))


@pytest.fixture
def ada(system: System) -> System:
    system.access.add_user("ada", ["developer"])
    system.people.set_password("ada", PASSWORD)
    return system


def test_a_person_gets_a_key_that_is_not_kept_on_the_way(ada: System) -> None:
    sent = post(ada, json.dumps({"name": "ada", "password": PASSWORD}).encode())
    assert sent.status == 200
    assert sent.headers["cache-control"] == "no-store"
    token = said(sent)["token"]
    assert ada.kernel.identity.authenticate(token).name == "ada"
    assert said(sent)["expires_in_s"] == 12 * 3600


def test_every_failure_has_one_answer(ada: System) -> None:
    bodies = [
        {"name": "ada", "password": "wrong"},
        {"name": "nobody", "password": PASSWORD},
        {"name": "ada", "password": PASSWORD[:-1], "code": "123456"},
    ]
    answers = []
    for body in bodies:
        sent = post(ada, json.dumps(body).encode())
        assert sent.status == 401
        answers.append(said(sent)["error"]["message"])
    assert len(set(answers)) == 1


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b'{"name": "ada"}', b'{"name": 1, "password": "secret words"}',
     b'{"name": "ada", "password": "secret words", "more": 1}', b'{"name": "ada", "password": '],
)  # fmt: skip
def test_another_body_is_refused_without_its_words(ada: System, body: bytes) -> None:
    sent = post(ada, body)
    assert sent.status == 400
    assert "secret" not in json.dumps(said(sent))


def test_a_large_body_is_not_read(ada: System) -> None:
    assert post(ada, b"x" * 3000).status == 413
