from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from llmos.errors import PromptTooLong
from llmos.models.encoding import Message, encode_chat
from llmos.models.generation import FinishReason, Piece, Runtime, Sampling, sample
from llmos.models.loading import LoadedModel

QUESTION: Sequence[Message] = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def runtime(tiny: LoadedModel) -> Runtime:
    return Runtime(tiny)


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def reference(tiny: LoadedModel, max_tokens: int) -> str:
    """What transformers' own generate makes of the same prompt."""
    prompt = encode_chat(QUESTION, tiny.tokenizer)
    made = tiny.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_tokens,
        do_sample=False,
    )
    text: str = tiny.tokenizer.decode(made[0, len(prompt) :], skip_special_tokens=True)
    return text


def test_greedy_text_equals_that_of_transformers(runtime: Runtime, tiny: LoadedModel) -> None:
    pieces = list(runtime.stream(QUESTION, max_tokens=60, sampling=GREEDY))
    assert text_of(pieces) == reference(tiny, 60)
    assert len(pieces) == 60


def test_the_last_piece_says_why_and_all_count_tokens(runtime: Runtime, tiny: LoadedModel) -> None:
    pieces = list(runtime.stream(QUESTION, max_tokens=5, sampling=GREEDY))
    assert [piece.completion_tokens for piece in pieces] == [1, 2, 3, 4, 5]
    assert [piece.finish_reason for piece in pieces] == [None] * 4 + [FinishReason.LENGTH]
    assert {piece.prompt_tokens for piece in pieces} == {len(encode_chat(QUESTION, tiny.tokenizer))}


def test_the_end_token_ends_the_answer_and_is_not_shown(tiny: LoadedModel) -> None:
    third = encode_greedy(tiny, 3)[2]
    ending = Runtime(tiny)
    ending._end_tokens = frozenset({third})
    pieces = list(ending.stream(QUESTION, max_tokens=60, sampling=GREEDY))
    assert len(pieces) == 3
    assert pieces[-1].finish_reason is FinishReason.STOP
    assert text_of(pieces) == reference(tiny, 2)


def encode_greedy(tiny: LoadedModel, count: int) -> list[int]:
    ids = encode_chat(QUESTION, tiny.tokenizer)
    made: list[int] = []
    with torch.inference_mode():
        for _ in range(count):
            logits = tiny.model(torch.tensor([ids + made])).logits[0, -1]
            made.append(int(logits.argmax()))
    return made


def test_end_tokens_come_from_tokenizer_and_generation_config(tiny: LoadedModel) -> None:
    assert Runtime(tiny)._end_tokens == {tiny.tokenizer.eos_token_id}
    before = tiny.model.generation_config.eos_token_id
    try:
        tiny.model.generation_config.eos_token_id = [7, 8]
        assert Runtime(tiny)._end_tokens == {tiny.tokenizer.eos_token_id, 7, 8}
    finally:
        tiny.model.generation_config.eos_token_id = before


def test_a_stop_string_ends_the_answer_before_it(runtime: Runtime) -> None:
    whole = text_of(list(runtime.stream(QUESTION, max_tokens=40, sampling=GREEDY)))
    stop = whole[8:11]
    pieces = list(runtime.stream(QUESTION, max_tokens=40, sampling=GREEDY, stop=["never", stop]))
    assert text_of(pieces) == whole.split(stop, maxsplit=1)[0]
    assert pieces[-1].finish_reason is FinishReason.STOP


def test_a_stop_string_in_the_flushed_end_counts(runtime: Runtime) -> None:
    whole = text_of(list(runtime.stream(QUESTION, max_tokens=6, sampling=GREEDY)))
    pieces = list(runtime.stream(QUESTION, max_tokens=6, sampling=GREEDY, stop=[whole[-1]]))
    assert text_of(pieces) == whole[: whole.index(whole[-1])]
    assert pieces[-1].finish_reason is FinishReason.STOP


def test_a_seed_repeats_an_answer_and_none_does_not(runtime: Runtime) -> None:
    def answer(seed: int | None) -> str:
        return text_of(list(runtime.stream(QUESTION, max_tokens=30, sampling=Sampling(seed=seed))))

    assert answer(5) == answer(5)
    assert answer(5) != answer(6)
    assert answer(None) != answer(None)  # equal with probability below 1e-9: 30 fresh tokens
    assert answer(-3) == answer(-3)


def test_a_long_prompt_is_refused_before_anything_is_computed(runtime: Runtime) -> None:
    long = [{"role": "user", "content": "patient " * 300}]
    with pytest.raises(PromptTooLong, match="256 tokens"):
        runtime.stream(long)
    with pytest.raises(PromptTooLong):
        runtime.stream(QUESTION, max_tokens=250)


def test_without_a_limit_the_answer_may_fill_the_context(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whether a random model ever says its end token depends on the machine's arithmetic.
    monkeypatch.setattr(runtime, "_end_tokens", frozenset())
    *_, last = runtime.stream(QUESTION, sampling=GREEDY)
    assert last.prompt_tokens + last.completion_tokens == runtime.context_tokens


def test_answers_under_way_do_not_disturb_each_other(runtime: Runtime) -> None:
    questions: list[Sequence[Message]] = [
        [{"role": "user", "content": f"Who is patient {number}?"}] for number in range(4)
    ]
    alone = [text_of(list(runtime.stream(q, max_tokens=20, sampling=GREEDY))) for q in questions]
    together: dict[int, str] = {}

    def ask(number: int) -> None:
        pieces = list(runtime.stream(questions[number], max_tokens=20, sampling=GREEDY))
        together[number] = text_of(pieces)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[number] for number in range(4)] == alone


def draw(logits: torch.Tensor, sampling: Sampling, times: int) -> dict[int, float]:
    generator = torch.Generator().manual_seed(0)
    drawn = [sample(logits, sampling, generator) for _ in range(times)]
    return {token: drawn.count(token) / times for token in set(drawn)}


LOGITS = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()


def test_sampling_follows_the_probabilities() -> None:
    shares = draw(LOGITS, Sampling(), 4000)
    for token, probability in enumerate((0.5, 0.2, 0.2, 0.1)):
        # 5 standard deviations; the seed is fixed, so this cannot fail by chance
        assert shares[token] == pytest.approx(probability, abs=0.04)


def test_a_lower_temperature_sharpens() -> None:
    shares = draw(LOGITS, Sampling(temperature=0.5), 4000)  # probabilities squared
    assert shares[0] == pytest.approx(0.25 / 0.34, abs=0.04)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1.0, {0, 1, 2, 3}), (0.85, {0, 1, 2}), (0.45, {0}), (0.0, {0})]
)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float, kept: set[int]) -> None:
    assert set(draw(LOGITS, Sampling(top_p=top_p), 500)) == kept


def test_greedy_takes_the_largest() -> None:
    assert draw(torch.tensor([0.0, 3.0, 2.0]), GREEDY, 5) == {1: 1.0}


def test_closing_an_answer_frees_its_turn(tiny: LoadedModel) -> None:
    calls: list[int] = []

    def count(*_: Any) -> None:
        calls.append(1)

    handle = tiny.model.register_forward_hook(count)
    try:
        answer: Any = Runtime(replace(tiny)).stream(QUESTION, sampling=GREEDY)
        next(answer)
        answer.close()
        assert list(answer) == []
        assert len(calls) == 1
    finally:
        handle.remove()
