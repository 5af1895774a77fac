"""The JSON of OpenAI's chat API, in and out; what is not offered is refused, never ignored."""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmos.errors import InvalidField
from llmos.models.encoding import Message
from llmos.models.generation import Piece, Sampling
from llmos.models.registry import ModelEntry
from llmos.workflows.chat import ChatRequest

Json = dict[str, Any]
MAX_STOPS: Final = 4


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TextPart(_Strict):
    """A part of a message; text is the only kind that is offered."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    # Clients send these back empty in the assistant's turns.
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def to_message(self) -> Message:
        """Return the turn as the chat template takes it."""
        text = (
            self.content
            if isinstance(self.content, str)
            else "".join(part.text for part in self.content)
        )
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Strict):
    """What a stream shall carry besides the text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextFormat(_Strict):
    """The one response format that is offered."""

    type: Literal["text"]


Stop = Annotated[str, Field(min_length=1, max_length=200)]


class ChatCompletionRequest(_Strict):
    """The body of POST /v1/chat/completions.

    A field of OpenAI's API that is not offered here is accepted with its neutral value only, so
    that no client believes in a tool, format or penalty that was dropped. `user` and `metadata`
    are accepted and not kept.
    """

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None

    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @classmethod
    def parse(cls, body: bytes) -> ChatCompletionRequest:
        """Read a request's body.

        Raises:
            InvalidField: names the first field that is wrong, never its value.
        """
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            raise _invalid(error) from None  # the cause holds the request's text

    def to_chat(self) -> ChatRequest:
        """Return the request as the workflow takes it; OpenAI's defaults fill the gaps."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return ChatRequest(
            model=self.model,
            messages=tuple(message.to_message() for message in self.messages),
            max_tokens=self.max_completion_tokens or self.max_tokens,
            sampling=Sampling(
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else self.top_p,
                seed=self.seed,
            ),
            stop=stops,
        )

    @property
    def wants_usage(self) -> bool:
        """Tell whether a stream ends with a chunk of usage counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


def _invalid(error: ValidationError) -> InvalidField:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or None
    if first["type"] == "json_invalid":
        return InvalidField(None, "the body is not valid JSON")
    if first["type"] == "extra_forbidden":
        return InvalidField(field, f"unrecognized request argument: {field}")
    return InvalidField(field, f"{field or 'the body'}: {first['msg']}")


class Envelope:
    """What the parts of one answer share: id, time of creation and model."""

    def __init__(self, entry: ModelEntry) -> None:
        """Begin the answer of a model."""
        self._shared: Json = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": entry.name,
            "system_fingerprint": f"fp_{entry.digest[:12]}",
        }

    def completion(self, text: str, last: Piece) -> Json:
        """Return the whole answer as one object."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": last.finish_reason,
        }
        return {
            **self._shared,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage(last),
        }

    def chunk(self, delta: Json, finish_reason: str | None = None) -> Json:
        """Return one part of a streamed answer."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._shared, "object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self, last: Piece) -> Json:
        """Return the part that only counts tokens."""
        return {
            **self._shared,
            "object": "chat.completion.chunk",
            "choices": [],
            "usage": usage(last),
        }


def usage(last: Piece) -> Json:
    """Count the tokens of an answer."""
    return {
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.completion_tokens,
        "total_tokens": last.prompt_tokens + last.completion_tokens,
    }


def model_card(entry: ModelEntry, created: int) -> Json:
    """Describe a model to a client."""
    return {"id": entry.name, "object": "model", "created": created, "owned_by": "llmos"}
