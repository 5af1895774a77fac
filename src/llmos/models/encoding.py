"""Text to token ids: the one encoding that training, measuring and serving share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from llmos.errors import ModelError

Message = Mapping[str, str]  # {"role": ..., "content": ...}


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one record; the loss counts the ids from `labels_from` to the end."""

    ids: tuple[int, ...]
    labels_from: int  # index of the first label, at least 1: position 0 has nothing before it


def encode(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> Encoded:
    """Encode one record of at most `max_tokens` ids.

    Without a prompt the record is plain text: the document-start token, then the text, every
    token of it a label. With a prompt, the model's chat template puts it before the completion
    exactly as serving does, and only the completion and its end token are labels. What is too
    long loses the front of its prompt first, then the end of its completion (or text).

    Raises:
        ModelError: `max_tokens` leaves no room for a single label.
    """
    if not prompt:
        ids = [start_token(tokenizer), *_plain_ids(completion, tokenizer)]
        return _cut(ids, 1, max_tokens)
    answer = [*_plain_ids(completion, tokenizer), end_token(tokenizer)]
    question = _chat_prompt(prompt, tokenizer)
    while prompt and len(question) + len(answer) > max_tokens:
        prompt = _without_front(prompt, len(question) + len(answer) - max_tokens, tokenizer)
        question = _chat_prompt(prompt, tokenizer)
    return _cut([*question, *answer], len(question), max_tokens)


def encode_continuation(
    prefix: str, text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> Encoded:
    """Encode `prefix + text` as plain text of which only `text` is labelled, for measuring.

    The ids are those that `encode("", prefix + text, ...)` gives; a token that spans the border
    counts as a label.
    """
    shown = _neutral(prefix, tokenizer)
    batch = tokenizer(
        shown + _neutral(text, tokenizer), add_special_tokens=False, return_offsets_mapping=True
    )
    ends = [end for _, end in batch["offset_mapping"]]
    border = next((i for i, end in enumerate(ends) if end > len(shown)), len(ends))
    return _cut([start_token(tokenizer), *batch["input_ids"]], 1 + border, max_tokens)


def encode_chat(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Encode a conversation up to the place where the assistant's next words belong.

    Control tokens inside a message's content are made harmless, so that content can never open
    a turn in another role. A tokenizer without a chat template gets the contents as plain text.

    Raises:
        ModelError: the model's chat template refuses this sequence of roles.
    """
    neutral = [
        {**message, "content": _neutral(message["content"], tokenizer)} for message in messages
    ]
    if tokenizer.chat_template is None:
        text = "\n".join(message["content"] for message in neutral)
        return [start_token(tokenizer), *_plain_ids(text, tokenizer)]
    try:
        text = tokenizer.apply_chat_template(neutral, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ModelError(
            f"the model's chat template refuses this conversation: {error}",
            hint="most models want one system message at most, then user and assistant in turn",
        ) from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that stands before plain text: the pre-training's document separator.

    Chat models often name a turn marker as their beginning-of-sequence token, after which plain
    text is unlikely; `<|endoftext|>`, where a tokenizer has it, is what documents began with.
    """
    vocabulary = tokenizer.get_added_vocab()
    for token in (vocabulary.get("<|endoftext|>"), tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ModelError("the tokenizer names no document-start, beginning or end token")


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that ends an answer."""
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer names no end-of-sequence token")
    return int(tokenizer.eos_token_id)


def _chat_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return encode_chat([{"role": "user", "content": prompt}], tokenizer)


def _plain_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(_neutral(text, tokenizer), add_special_tokens=False)["input_ids"])


def _neutral(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Put a space after the first character of every control token that the text spells out."""
    for added in tokenizer.added_tokens_decoder.values():
        if added.special and added.content in text:
            text = text.replace(added.content, f"{added.content[0]} {added.content[1:]}")
    return text


def _without_front(prompt: str, tokens: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Drop at least one character and about `tokens` tokens from the front of the prompt."""
    offsets = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in offsets["offset_mapping"]]
    return prompt[max(1, ends[tokens - 1]) :] if tokens < len(ends) else ""


def _cut(ids: list[int], labels_from: int, max_tokens: int) -> Encoded:
    if labels_from >= max_tokens:
        raise ModelError(
            f"a record needs {labels_from} tokens before its first label, "
            f"but max_tokens is {max_tokens}",
            hint="raise max_tokens",
        )
    return Encoded(tuple(ids[:max_tokens]), labels_from)
