"""The server as its users meet it: uvicorn on loopback and the real `openai` client."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from tests.conftest import ServedHome
from tests.databases import STRICT
from tests.homes import until

from llmos.models.runtimes import Runtimes
from llmos.server.app import build_app
from llmos.server.binding import bind
from llmos.server.listener import base_url, make_server

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
DEADLINE_S = 30.0


@contextmanager
def serving(home: ServedHome, **limits: int) -> Iterator[str]:
    app = build_app(home.parts, Runtimes(home.parts.registry, torch.device("cpu")), **limits)
    ready = threading.Event()
    with bind("127.0.0.1", 0) as listening:
        server = make_server(app, None, ready.set)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            assert ready.wait(DEADLINE_S)
            yield base_url(listening, "127.0.0.1", secure=False)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def url(served_home: ServedHome) -> Iterator[str]:
    with serving(served_home) as url:
        yield url


@pytest.fixture(scope="module")
def token(served_home: ServedHome) -> str:
    return served_home.key("app", "developer")


Connect = Callable[[str], openai.OpenAI]


@pytest.fixture
def connect(url: str) -> Iterator[Connect]:
    clients: list[openai.OpenAI] = []

    def connected(token: str) -> openai.OpenAI:
        clients.append(openai.OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0))
        return clients[-1]

    yield connected
    for client in clients:
        client.close()


@pytest.fixture
def client(connect: Connect, token: str) -> openai.OpenAI:
    return connect(token)


# Models


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "notes"]
    model = client.models.retrieve("notes")
    assert (model.id, model.object, model.owned_by) == ("notes", "model", "llmos")
    assert abs(model.created - time.time()) < 600


def test_a_key_sees_and_uses_only_its_models(connect: Connect, served_home: ServedHome) -> None:
    client = connect(served_home.key("tiny-only", "developer", "tiny"))
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.PermissionDeniedError):
        client.models.retrieve("notes")
    with pytest.raises(openai.PermissionDeniedError) as caught:
        client.chat.completions.create(model="notes", messages=QUESTION)
    assert caught.value.code == "permission_denied"


# Chat


def test_a_chat_is_answered(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="notes", messages=QUESTION, max_tokens=5, temperature=0
    )
    assert answer.object == "chat.completion"
    assert answer.model == "notes"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5
    assert answer._request_id is not None
    assert answer._request_id.startswith("req_")


def test_a_stream_carries_the_same_text(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model="notes", messages=QUESTION, max_tokens=20, temperature=0
    )
    stream = client.chat.completions.create(
        model="notes",
        messages=QUESTION,
        max_completion_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 5  # it came in parts


def test_a_stream_ends_as_openai_ends_it(url: str, token: str) -> None:
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": 2, "stream": True}
    response = httpx.post(
        f"{url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {token}"}
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: ")) for event in events[:-2])
    assert "usage" not in response.text


def test_a_seed_repeats_an_answer(client: openai.OpenAI) -> None:
    answers = {
        client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=15, seed=seed)
        .choices[0]
        .message.content
        for seed in (1, 1, 2)
    }
    assert len(answers) == 2


def test_a_stop_string_is_honoured(client: openai.OpenAI) -> None:
    def ask(**options: Any) -> Any:
        return client.chat.completions.create(
            model="tiny", messages=QUESTION, max_tokens=30, temperature=0, **options
        ).choices[0]

    stop = (ask().message.content or "")[5:8]
    choice = ask(stop=[stop])
    assert choice.finish_reason == "stop"
    assert stop not in choice.message.content


def test_a_conversation_may_hold_earlier_answers_and_parts(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=3)
    messages: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        *QUESTION,
        first.choices[0].message,
        {"role": "user", "content": [{"type": "text", "text": "Go on."}]},
    ]
    assert client.chat.completions.create(model="tiny", messages=messages, max_tokens=3).choices


def test_requests_at_the_same_time_get_their_own_answers(client: openai.OpenAI) -> None:
    def ask(number: int) -> str | None:
        messages: list[Any] = [{"role": "user", "content": f"Who is patient {number}?"}]
        answer = client.chat.completions.create(
            model=("tiny", "notes")[number % 2], messages=messages, max_tokens=12, temperature=0
        )
        return answer.choices[0].message.content

    alone = [ask(number) for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(6))) == alone


# Refusals


@pytest.mark.parametrize("token", ["llmos_wrong", "llmos_AAAAAAAA_" + "A" * 43, "sk-1234"])
def test_a_wrong_key_is_refused(connect: Connect, token: str) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        connect(token).models.list()
    assert caught.value.code == "invalid_api_key"
    assert caught.value.response.headers["www-authenticate"].startswith("Bearer")
    assert token not in caught.value.response.text


def test_a_revoked_key_is_refused_at_once(connect: Connect, served_home: ServedHome) -> None:
    token = served_home.key("leaver", "developer")
    client = connect(token)
    client.models.list()
    kernel = served_home.parts.kernel
    with kernel.store.transaction() as conn:
        kernel.identity.revoke_key(conn, token.split("_")[1])
    with pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_a_role_without_the_right_is_refused(connect: Connect, served_home: ServedHome) -> None:
    client = connect(served_home.key("auditor", "auditor"))
    assert list(client.models.list()) == []
    with pytest.raises(openai.PermissionDeniedError):
        client.chat.completions.create(model="tiny", messages=QUESTION)


def test_an_unknown_model_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="note", messages=QUESTION)
    assert caught.value.code == "model_not_found"
    assert "did you mean notes?" in caught.value.message


def test_what_is_not_offered_is_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=QUESTION, n=2)
    assert caught.value.param == "n"
    assert caught.value.type == "invalid_request_error"


def test_a_prompt_beyond_the_context_is_refused(client: openai.OpenAI) -> None:
    long: list[Any] = [{"role": "user", "content": "patient " * 400}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=long, stream=True)
    assert caught.value.code == "context_length_exceeded"


def post(url: str, token: str, **options: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {token}", **options.pop("headers", {})}
    return httpx.post(f"{url}/v1/chat/completions", headers=headers, **options)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"model": "\\ud800"}'])
def test_malformed_json_is_refused(url: str, token: str, content: bytes) -> None:
    response = post(url, token, content=content)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_an_oversized_body_is_refused_announced_or_not(url: str, token: str) -> None:
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "x" * (1 << 20)}]})
    announced = post(url, token, content=body.encode())
    chunked = post(url, token, content=iter([body[:999].encode(), body[999:].encode()]))
    for response in (announced, chunked):
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"


def test_no_key_no_body_is_read(url: str) -> None:
    response = httpx.post(f"{url}/v1/chat/completions", content=b"{")
    assert response.status_code == 401


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405), ("DELETE", "/health", 405)],
)
def test_other_paths_and_methods_are_refused_in_the_same_shape(
    url: str, token: str, method: str, path: str, status: int
) -> None:
    response = httpx.request(method, url + path, headers={"Authorization": f"Bearer {token}"})
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_health_needs_no_key_and_tells_nothing(url: str) -> None:
    response = httpx.get(f"{url}/health")
    assert response.json() == {"status": "ok"}
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-store"
    assert "server" not in response.headers


def test_no_other_origin_is_let_in(url: str, token: str) -> None:
    preflight = httpx.options(f"{url}/v1/chat/completions", headers={"Origin": "https://evil.test"})
    assert preflight.status_code == 401
    listing = httpx.get(
        f"{url}/v1/models",
        headers={"Authorization": f"Bearer {token}", "Origin": "https://evil.test"},
    )
    assert not [name for name in listing.headers if name.startswith("access-control")]


# Load and disconnects


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_answer(
    url: str, token: str, served_home: ServedHome, stream: bool
) -> None:
    before = len(served_home.records("chat"))
    body = json.dumps(
        {"model": "tiny", "messages": QUESTION, "temperature": 0, "stream": stream}
    ).encode()
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as leaving:
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
            f"Authorization: Bearer {token}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        leaving.sendall(head.encode() + body)
        if stream:
            assert leaving.recv(15) == b"HTTP/1.1 200 OK"
        else:
            until(lambda: len(served_home.records("chat")) == before + 1)  # it is admitted
    until(lambda: len(served_home.records("chat")) == before + 2)
    details = served_home.records("chat")[-1]["details"]
    assert details["finish_reason"] == "unfinished"
    assert details["completion_tokens"] < 200  # it would have filled the context


def test_beyond_the_limit_requests_are_told_to_come_again(served_home: ServedHome) -> None:
    token = served_home.key("busy", "developer")
    body = json.dumps({"model": "tiny", "messages": QUESTION, "max_tokens": 1}).encode()
    with serving(served_home, max_concurrent_requests=1) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as first:
            head = (
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nExpect: 100-continue\r\n"
                f"Authorization: Bearer {token}\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            first.sendall(head.encode())
            assert first.recv(1024).startswith(b"HTTP/1.1 100 ")  # its body is being waited for
            second = post(url, token, content=body)
            assert second.status_code == 429
            assert second.headers["retry-after"] == "1"
            assert second.json()["error"]["code"] == "rate_limit_exceeded"
            listing = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {token}"})
            assert listing.status_code == 200
            first.sendall(body)
            assert first.recv(15) == b"HTTP/1.1 200 OK"
        until(lambda: post(url, token, content=body).status_code == 200)


# The process

SERVE = """
import sys
from llmos import system
from llmos.server.lifecycle import serve_system
serve_system(system.open_home(sys.argv[1]), port=0, on_ready=lambda url: print(url, flush=True))
print("ended", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_after_the_answers_under_way(
    served_home: ServedHome, number: signal.Signals
) -> None:
    home: Path = served_home.parts.kernel.config.home
    token = served_home.key(f"until-{number.name}", "developer")
    with subprocess.Popen(
        [sys.executable, *STRICT, "-c", SERVE, str(home)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        with httpx.stream(
            "POST",
            f"{url}/v1/chat/completions",
            json={"model": "tiny", "messages": QUESTION, "max_tokens": 30, "stream": True},
            headers={"Authorization": f"Bearer {token}"},
            timeout=DEADLINE_S,
        ) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(number)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, out, err) == (0, "ended\n", "")


@pytest.mark.model
def test_the_real_model_knows_the_capital_of_france(smollm2_folder: Path, tmp_path: Path) -> None:
    from llmos import system
    from llmos.models.folders import digest

    parts = system.create(tmp_path / "home", device="cpu").parts
    (tmp_path / "home/models/smollm2-135m").symlink_to(smollm2_folder)
    with parts.kernel.store.transaction() as conn:
        parts.registry.register_base(
            conn, "smollm2-135m", "models/smollm2-135m", digest(smollm2_folder), {}
        )
    home = ServedHome(parts)
    with (
        serving(home) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=home.key("app", "developer")) as client,
    ):
        answer = client.chat.completions.create(
            model="smollm2-135m", messages=QUESTION, temperature=0, max_tokens=20
        )
    parts.kernel.store.close()
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
