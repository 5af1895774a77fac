"""Chat: policy first, then text piece by piece, then a record of counts; never of text."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.models.encoding import Message
from llmos.models.generation import FinishReason, Piece, Sampling
from llmos.models.registry import ModelEntry, ModelKind
from llmos.models.runtimes import Runtimes
from llmos.workflows.parts import Parts


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A conversation and how to go on with it."""

    model: str
    messages: tuple[Message, ...]
    max_tokens: int | None = None  # None: up to the runtime's default
    sampling: Sampling | None = None  # None: the runtime's default
    stop: tuple[str, ...] = ()


class Answer(Iterator[Piece]):
    """An answer under way. Whoever has one must close it: that writes its record, once.

    `with run(...) as answer:` does so on every way out, also when nobody reads it to the end.
    """

    def __init__(
        self, entry: ModelEntry, pieces: Iterator[Piece], who: Principal, parts: Parts, key: str
    ) -> None:
        """Wrap the pieces of an admitted chat."""
        self.entry = entry
        self._pieces: Iterator[Piece] | None = pieces
        self._last: Piece | None = None
        self._who = who
        self._parts = parts
        self._key = key

    def __next__(self) -> Piece:
        """Make one more token."""
        if self._pieces is None:
            raise StopIteration
        self._last = next(self._pieces)
        return self._last

    def __enter__(self) -> Self:
        """Use the answer inside a block."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """End the generation and record how many tokens it read and made."""
        if self._pieces is None:
            return
        self._pieces = None
        last = self._last
        details = {
            "job": self._key,
            "prompt_tokens": last.prompt_tokens if last else 0,
            "completion_tokens": last.completion_tokens if last else 0,
            "finish_reason": str(_reason(last)),
        }
        with self._parts.kernel.monitor.act(
            self._who, Action.CHAT, self.entry.resource, details=details
        ):
            pass


def run(request: ChatRequest, who: Principal, parts: Parts, runtimes: Runtimes) -> Answer:
    """Admit a chat and begin its answer; every refusal is raised here, before the first token.

    Two records belong to a chat: its admission, before anything is computed, and its counts, when
    the answer is closed; their random `job` key joins them.

    Raises:
        UnknownModel: there is no model of this name.
        PermissionDenied: policy or the key's scope forbids this principal the model.
        PromptTooLong: the conversation does not fit into the model's context.
    """
    entry = parts.registry.model(request.model)
    key = f"chat-{secrets.token_hex(8)}"
    objects = {entry.location} if entry.kind is ModelKind.ADAPTER else set()
    with parts.kernel.monitor.admit(
        who,
        Action.CHAT,
        entry.resource,
        key=key,
        objects=frozenset(objects),
        charge=None,
        details={"digest": entry.digest},
    ) as grant:
        pieces = runtimes.open(entry, grant).stream(
            request.messages,
            max_tokens=request.max_tokens,
            sampling=request.sampling,
            stop=request.stop,
        )
    return Answer(entry, pieces, who, parts, key)


def usable_models(who: Principal, parts: Parts) -> list[ModelEntry]:
    """Return the models that this principal may chat with."""
    return [
        entry
        for entry in parts.registry.models()
        if parts.kernel.policy.decide(who, Action.CHAT, entry.resource, {}).allowed
    ]


def _reason(last: Piece | None) -> FinishReason | str:
    return last.finish_reason if last and last.finish_reason else "unfinished"
