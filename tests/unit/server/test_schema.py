from __future__ import annotations

import json
from typing import Any

import pytest

from llmos.errors import InvalidField
from llmos.models.generation import FinishReason, Piece, Sampling
from llmos.models.registry import ModelEntry, ModelKind
from llmos.server.schema import ChatCompletionRequest, Envelope, model_card

MINIMAL: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
ENTRY = ModelEntry("tiny", ModelKind.BASE, None, "models/tiny", "ab" * 32, {}, "2026-01-01")
LAST = Piece("", FinishReason.STOP, 7, 3)


def parse(**changes: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.parse(json.dumps({**MINIMAL, **changes}).encode())


def test_a_minimal_request_gets_openais_defaults() -> None:
    chat = parse().to_chat()
    assert chat.model == "tiny"
    assert chat.messages == ({"role": "user", "content": "Hi"},)
    assert chat.sampling == Sampling(temperature=1.0, top_p=1.0, seed=None)
    assert (chat.max_tokens, chat.stop) == (None, ())


def test_every_option_arrives() -> None:
    request = parse(
        temperature=0, top_p=0.5, seed=-1, stop=["a", "b"], max_tokens=9, max_completion_tokens=5,
        stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    chat = request.to_chat()
    assert chat.sampling == Sampling(temperature=0.0, top_p=0.5, seed=-1)
    assert (chat.max_tokens, chat.stop) == (5, ("a", "b"))
    assert request.stream
    assert request.wants_usage
    assert not parse(stream=True).wants_usage
    assert parse(stop="x").to_chat().stop == ("x",)


def test_developers_are_systems_and_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}]
    assert parse(messages=messages).to_chat().messages == (
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "ab"},
    )


@pytest.mark.parametrize(
    "neutral",
    [
        {"n": 1}, {"n": None}, {"tools": []}, {"logprobs": False}, {"top_logprobs": 0},
        {"frequency_penalty": 0}, {"presence_penalty": 0.0}, {"logit_bias": {}},
        {"response_format": {"type": "text"}}, {"tool_choice": "none"}, {"store": False},
        {"user": "u1"}, {"metadata": {"a": "b"}}, {"parallel_tool_calls": True},
        {"service_tier": "auto"}, {"stream_options": {"include_obfuscation": False}},
    ],
)  # fmt: skip
def test_neutral_values_of_what_is_not_offered_are_accepted(neutral: dict[str, Any]) -> None:
    assert parse(**neutral).to_chat() == parse().to_chat()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"frequency_penalty": 0.1}, "frequency_penalty"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"store": True}, "store"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "0"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "name": "n"}]}, "messages.0.name"),
        ({"model": None}, "model"),
        ({"wat": 1}, "wat"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        parse(**changes)
    assert caught.value.field == field
    assert field in caught.value.message


@pytest.mark.parametrize("stop", ["", [""], ["a"] * 5, "x" * 201])
def test_stop_strings_are_few_short_and_not_empty(stop: object) -> None:
    with pytest.raises(InvalidField, match="stop"):
        parse(stop=stop)


def test_images_are_refused() -> None:
    image = {"type": "image_url", "image_url": {"url": "http://x"}}
    with pytest.raises(InvalidField, match=r"messages\.0\.content"):
        parse(messages=[{"role": "user", "content": [image]}])


def test_an_error_never_repeats_what_was_sent() -> None:
    secret = "Maria has asthma"
    with pytest.raises(InvalidField) as caught:
        parse(messages=[{"role": "user", "content": {"text": secret}}])
    assert secret not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b'{"model": "\\ud800"}'])
def test_what_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidField, match="not valid JSON") as caught:
        ChatCompletionRequest.parse(body)
    assert caught.value.field is None


def test_a_body_that_is_no_object_is_refused() -> None:
    with pytest.raises(InvalidField, match="the body"):
        ChatCompletionRequest.parse(b"[]")


def test_the_parts_of_an_answer_share_an_id() -> None:
    envelope = Envelope(ENTRY)
    completion, chunk = envelope.completion("text", LAST), envelope.chunk({"content": "t"})
    assert completion["id"] == chunk["id"] == envelope.usage_chunk(LAST)["id"]
    assert completion["system_fingerprint"] == "fp_abababababab"
    assert completion["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    assert completion["choices"][0]["finish_reason"] == "stop"
    assert chunk["choices"][0]["finish_reason"] is None
    assert Envelope(ENTRY).completion("", LAST)["id"] != completion["id"]
    assert model_card(ENTRY, 5)["created"] == 5
