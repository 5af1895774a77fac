from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.conftest import ServedHome, log_entries

from llmos.errors import PermissionDenied, PromptTooLong, UnknownModel
from llmos.kernel.identity import Principal
from llmos.models.generation import Sampling
from llmos.models.runtimes import Runtimes
from llmos.workflows import chat
from llmos.workflows.chat import ChatRequest

SECRET = "Zyxwv has a rash"
REQUEST = ChatRequest(
    model="notes",
    messages=({"role": "user", "content": SECRET},),
    max_tokens=4,
    sampling=Sampling(temperature=0),
)


@pytest.fixture(scope="module")
def developer(served_home: ServedHome) -> Principal:
    return served_home.parts.kernel.identity.authenticate(served_home.key("dev", "developer"))


@pytest.fixture(scope="module")
def runtimes(served_home: ServedHome) -> Runtimes:
    return Runtimes(served_home.parts.registry, torch.device("cpu"))


def test_a_chat_is_recorded_by_counts_and_never_by_text(
    served_home: ServedHome, developer: Principal, runtimes: Runtimes
) -> None:
    with chat.run(REQUEST, developer, served_home.parts, runtimes) as answer:
        pieces = list(answer)
    text = "".join(piece.text for piece in pieces)

    admitted, done = served_home.records("chat")[-2:]
    assert (admitted["outcome"], done["outcome"]) == ("admitted", "done")
    assert admitted["actor"] == done["actor"] == "dev"
    assert admitted["resource"] == done["resource"] == "Model::notes"
    assert admitted["details"]["job"] == done["details"]["job"]
    assert admitted["details"]["digest"] == served_home.parts.registry.model("notes").digest
    assert done["details"]["prompt_tokens"] == pieces[0].prompt_tokens > 0
    assert done["details"]["completion_tokens"] == 4
    assert done["details"]["finish_reason"] == "length"
    log = b"".join(log_entries(served_home.parts.kernel))
    assert SECRET.encode() not in log
    assert text
    assert text.encode() not in log


def test_an_answer_that_nobody_reads_to_its_end_is_recorded_once(
    served_home: ServedHome, developer: Principal, runtimes: Runtimes
) -> None:
    before = len(served_home.records("chat"))
    answer = chat.run(REQUEST, developer, served_home.parts, runtimes)
    next(answer)
    answer.close()
    answer.close()
    assert list(answer) == []
    records = served_home.records("chat")
    assert len(records) == before + 2
    assert records[-1]["details"]["finish_reason"] == "unfinished"
    assert records[-1]["details"]["completion_tokens"] == 1


def test_an_answer_that_was_never_begun_is_recorded_too(
    served_home: ServedHome, developer: Principal, runtimes: Runtimes
) -> None:
    chat.run(REQUEST, developer, served_home.parts, runtimes).close()
    details = served_home.records("chat")[-1]["details"]
    assert (details["completion_tokens"], details["finish_reason"]) == (0, "unfinished")


def test_policy_decides_before_anything_is_loaded(served_home: ServedHome) -> None:
    kernel = served_home.parts.kernel
    auditor = kernel.identity.authenticate(served_home.key("aud", "auditor"))
    runtimes = Runtimes(served_home.parts.registry, torch.device("cpu"))
    with pytest.raises(PermissionDenied):
        chat.run(REQUEST, auditor, served_home.parts, runtimes)
    assert not runtimes._kept
    assert served_home.records("chat")[-1]["outcome"] == "denied"


def test_a_key_reaches_only_its_models(served_home: ServedHome, runtimes: Runtimes) -> None:
    parts = served_home.parts
    who = parts.kernel.identity.authenticate(served_home.key("narrow", "developer", "tiny"))
    assert [entry.name for entry in chat.usable_models(who, parts)] == ["tiny"]
    with pytest.raises(PermissionDenied):
        chat.run(REQUEST, who, parts, runtimes)
    with chat.run(replace(REQUEST, model="tiny"), who, parts, runtimes) as answer:
        assert list(answer)


def test_a_refused_prompt_is_recorded_as_failed(
    served_home: ServedHome, developer: Principal, runtimes: Runtimes
) -> None:
    with pytest.raises(PromptTooLong):
        chat.run(replace(REQUEST, max_tokens=999), developer, served_home.parts, runtimes)
    record = served_home.records("chat")[-1]
    assert (record["outcome"], record["details"]["error"]) == ("failed", "PromptTooLong")


def test_an_unknown_model_is_named(
    served_home: ServedHome, developer: Principal, runtimes: Runtimes
) -> None:
    with pytest.raises(UnknownModel, match="nothing"):
        chat.run(replace(REQUEST, model="nothing"), developer, served_home.parts, runtimes)
