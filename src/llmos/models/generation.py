"""The text generator: one key-value cache per answer, one forward pass at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import torch
from transformers import DynamicCache

from llmos.errors import PromptTooLong
from llmos.models.detokenization import Detokenizer, StopScanner
from llmos.models.encoding import Message, encode_chat, end_token
from llmos.models.loading import LoadedModel

DEFAULT_MAX_TOKENS: Final = 1024


class FinishReason(StrEnum):
    """Why an answer ended, in OpenAI's words."""

    STOP = "stop"  # the model ended its turn, or a stop string appeared
    LENGTH = "length"  # max_tokens or the model's context is used up


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn; temperature 0 is greedy and needs no randomness."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None  # None draws 8 bytes from the system's CSPRNG


@dataclass(frozen=True, slots=True)
class Piece:
    """The text that one more token completed; it may be empty while a character is unfinished."""

    text: str
    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int  # so far


class Runtime:
    """Answers conversations with one loaded model; any number of threads may ask at once.

    The lock is held for one forward pass, not for one answer: answers under way take turns token
    by token, and a client that reads slowly holds up nobody.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        """Serve `loaded`, whose model must not be changed afterwards."""
        self._loaded = loaded
        self._lock = threading.Lock()
        self._end_tokens = _end_tokens(loaded)
        self.context_tokens = int(loaded.model.config.max_position_embeddings)

    def stream(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[Piece]:
        """Return an iterator that makes one token per step; closing it ends the work.

        The prompt is encoded and checked before this returns, so that a refusal comes first.

        Raises:
            PromptTooLong: prompt and `max_tokens` do not fit into the model's context.
            ModelError: the chat template refuses the conversation.
        """
        prompt = encode_chat(messages, self._loaded.tokenizer)
        room = self.context_tokens - len(prompt)
        if room < (max_tokens or 1):
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens and {max_tokens or 1} more are asked for, "
                f"but this model's context is {self.context_tokens} tokens",
                hint="shorten the conversation or lower max_tokens",
            )
        limit = max_tokens or min(room, DEFAULT_MAX_TOKENS)
        return self._answer(prompt, limit, sampling or Sampling(), stop)

    def _answer(
        self, prompt: list[int], limit: int, sampling: Sampling, stop: Sequence[str]
    ) -> Iterator[Piece]:
        detokenizer = Detokenizer(self._loaded.tokenizer)
        scanner = StopScanner(stop)
        for made, token in enumerate(self._tokens(prompt, sampling), start=1):
            ended = token in self._end_tokens
            text = "" if ended else scanner.push(detokenizer.push(token))
            last = ended or made == limit
            if last and not scanner.stopped:
                text += scanner.push(detokenizer.flush())
            if scanner.stopped or last:
                reason = FinishReason.STOP if scanner.stopped or ended else FinishReason.LENGTH
                text += scanner.flush()
                yield Piece(text, reason, len(prompt), made)
                return
            yield Piece(text, None, len(prompt), made)

    def _tokens(self, prompt: list[int], sampling: Sampling) -> Iterator[int]:
        cache = DynamicCache(config=self._loaded.model.config)
        generator = _generator(sampling)
        ids = prompt
        while True:
            token = sample(self._next_logits(ids, cache), sampling, generator)
            yield token
            ids = [token]

    @torch.inference_mode()
    def _next_logits(self, ids: list[int], cache: DynamicCache) -> torch.Tensor:  # (V,)
        batch = torch.tensor([ids], device=self._loaded.device)  # (1, T)
        with self._lock:
            output = self._loaded.model(
                input_ids=batch, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
        logits: torch.Tensor = output.logits[0, -1]
        return logits.float().cpu()


def sample(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw a token from logits (V,): greedy, or temperature and then nucleus sampling.

    The nucleus is the smallest set of tokens whose probability reaches `top_p`
    (Holtzman et al. 2020, arXiv:1904.09751).
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities, tokens = torch.softmax(logits / sampling.temperature, -1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    nucleus = torch.where(before < sampling.top_p, probabilities, 0.0)
    nucleus[0] = probabilities[0]  # never empty, even for top_p = 0
    return int(tokens[torch.multinomial(nucleus, 1, generator=generator)])


def _generator(sampling: Sampling) -> torch.Generator:
    seed = int.from_bytes(os.urandom(8)) if sampling.seed is None else sampling.seed
    return torch.Generator().manual_seed(seed % 2**63)


def _end_tokens(loaded: LoadedModel) -> frozenset[int]:
    configured = loaded.model.generation_config.eos_token_id
    more = configured if isinstance(configured, list) else [configured]
    return frozenset({end_token(loaded.tokenizer), *(int(t) for t in more if t is not None)})
