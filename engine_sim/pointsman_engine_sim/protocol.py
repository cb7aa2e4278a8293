"""The part of the OpenAI API that a simulated engine speaks, in vLLM's dialect."""

from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Literal, Self, TypeVar

import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from pointsman_engine_sim.answers import Answer, Cut, count_tokens

RequestT = TypeVar("RequestT", bound="CompletionOptions")
TokenCount = Annotated[int, Field(ge=1)]

MAX_DESCRIBED = 10
"""Errors that one message lists."""

MAX_STOPS = 16
"""Texts of `stop`; OpenAI takes 4, vLLM any number."""

_ERROR_TYPES = {
    HTTPStatus.BAD_REQUEST: "BadRequestError",
    HTTPStatus.NOT_FOUND: "NotFoundError",
    HTTPStatus.INTERNAL_SERVER_ERROR: "InternalServerError",
}


class APIError(Exception):
    """An answer that is an OpenAI error object."""

    def __init__(self, status: HTTPStatus, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param

    def body(self) -> bytes:
        """Render as JSON."""
        error = {
            "message": self.message,
            "type": _ERROR_TYPES.get(self.status, self.status.phrase),
            "param": self.param,
            "code": int(self.status),
        }
        return orjson.dumps({"error": error})


class TextPart(BaseModel):
    """One part of a message; the simulated models read text only."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    role: str
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None

    @property
    def text(self) -> str:
        """All of its text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class StreamOptions(BaseModel):
    """Extras of a streamed answer."""

    include_usage: bool = False


def _texts(value: object) -> object:
    match value:
        case None:
            return ()
        case str():
            return (value,)
    return value


StopTexts = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(_texts),
    Field(max_length=MAX_STOPS),
]


class ResponseFormat(BaseModel):
    """In which form the answer is wanted."""

    type: str


class CompletionOptions(BaseModel):
    """What both endpoints understand; other fields are ignored, as sampling is simulated.

    What would change the form of the answer and is not simulated is refused.
    """

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = 1
    max_tokens: TokenCount | None = None
    min_tokens: int = Field(default=0, ge=0)
    ignore_eos: bool = False
    stop: StopTexts = ()
    logprobs: bool | int | None = None
    top_logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None
    tool_choice: str | dict[str, object] | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _nothing_that_is_not_simulated(self) -> Self:
        asked = {
            "logprobs": self.logprobs is not None and self.logprobs is not False,
            "top_logprobs": bool(self.top_logprobs),
            "echo": bool(self.echo),
            "best_of": self.best_of not in (None, 1),
            "suffix": bool(self.suffix),
            "tool_choice": self.tool_choice not in (None, "none", "auto"),
            "response_format": self.response_format not in (None, ResponseFormat(type="text")),
        }
        if wrong := [name for name, given in asked.items() if given]:
            raise ValueError(f"Not supported by the simulated engine: {', '.join(wrong)}.")
        return self

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("Stream options can only be defined when `stream=True`.")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether the stream shall end with a chunk that carries the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(CompletionOptions):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: TokenCount | None = None

    @property
    def prompt_text(self) -> str:
        """All that the model reads, as one string."""
        return "".join(message.text for message in self.messages)

    @property
    def prompt_tokens(self) -> int:
        """Estimated length of the prompt."""
        return count_tokens(self.prompt_text)

    @property
    def limit(self) -> int | None:
        """Most tokens that the answer may have; None: as many as the context allows."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(CompletionOptions):
    """Body of ``POST /v1/completions``; a prompt of token ids has an exact length."""

    prompt: str | Annotated[list[int], Field(min_length=1, fail_fast=True)]
    max_tokens: TokenCount | None = 16

    @field_validator("prompt", mode="before")
    @classmethod
    def _take_single_prompt(cls, value: object) -> object:
        match value:
            case [str() | list() as single]:
                return single
        return value

    @property
    def prompt_text(self) -> str:
        """All that the model reads, as one string."""
        return self.prompt if isinstance(self.prompt, str) else " ".join(map(str, self.prompt))

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt: exact for token ids, else estimated."""
        return count_tokens(self.prompt) if isinstance(self.prompt, str) else len(self.prompt)

    @property
    def limit(self) -> int | None:
        """Most tokens that the answer may have; None: as many as the context allows."""
        return self.max_tokens


def parse(kind: type[RequestT], body: bytes) -> RequestT:
    """Read a request's body; raises `APIError` (400) that names the wrong fields.

    Of a list it names the first wrong item: a body may hold a million of them.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise APIError(HTTPStatus.BAD_REQUEST, describe(error)) from error


def describe(error: ValidationError) -> str:
    """List the first wrong fields and what is wrong with them, on one line."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    listed = [
        ": ".join(filter(None, (".".join(map(str, item["loc"])), item["msg"])))
        for item in errors[:MAX_DESCRIBED]
    ]
    if len(errors) > MAX_DESCRIBED:
        listed.append(f"and {len(errors) - MAX_DESCRIBED} more")
    return "; ".join(listed)


@dataclass(frozen=True, slots=True)
class Dialect:
    """What differs between answers of the two endpoints."""

    id_prefix: str
    body_object: str
    chunk_object: str
    before_token: bytes
    after_token: bytes
    first_choice: bytes | None
    """The choice in the chunk that comes before the first token, if there is one."""


CHAT = Dialect(
    id_prefix="chatcmpl-",
    body_object="chat.completion",
    chunk_object="chat.completion.chunk",
    before_token=b'"delta":{"content":"',
    after_token=b'"}',
    first_choice=b'"delta":{"role":"assistant","content":""}',
)
COMPLETION = Dialect(
    id_prefix="cmpl-",
    body_object="text_completion",
    chunk_object="text_completion",
    before_token=b'"text":"',
    after_token=b'"',
    first_choice=None,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One answer, rendered whole or as server-sent events.

    Chunks are put together from bytes: a token costs no JSON encoder.
    """

    dialect: Dialect
    request_id: str
    model: str
    created: int
    """Unix time in seconds."""
    answer: Answer
    prompt_tokens: int
    output_tokens: int
    finish_reason: Literal["stop", "length"]
    cut: Cut | None = None
    """Where a text of `stop` ends the answer."""

    def body(self) -> bytes:
        """Render the whole answer."""
        text = self.answer.text(self.output_tokens)
        if self.cut is not None:
            text = text[: self.cut.characters]
        choice: dict[str, object] = {"index": 0, "logprobs": None}
        if self.dialect is CHAT:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        choice["finish_reason"] = self.finish_reason
        envelope = self._envelope(self.dialect.body_object)
        return orjson.dumps({**envelope, "choices": [choice], "usage": self._usage()})

    def opening(self) -> bytes:
        """Render what comes before the first token; may be empty."""
        choice = self.dialect.first_choice
        return self._event_start() + choice + _EVENT_END if choice else b""

    def tokens(self, first: int, last: int) -> bytes:
        """Render tokens ``first`` to ``last`` (exclusive), one event each."""
        start = self._event_start() + self.dialect.before_token
        end = self.dialect.after_token + _EVENT_END
        token = self.answer.token_json if self.cut is None else self._cut_token
        events = [start + token(index) + end for index in range(first, last)]
        if events and last == self.output_tokens:
            reason = b'"finish_reason":"%b"' % self.finish_reason.encode()
            events[-1] = events[-1].replace(b'"finish_reason":null', reason)
        return b"".join(events)

    def _cut_token(self, index: int) -> bytes:
        """A token without what is behind the answer's end; as vLLM does, tokens may be empty."""
        cut = self.cut
        if cut is None or index < cut.whole_tokens:
            return self.answer.token_json(index)
        text = self.answer.token(index)[: cut.rest] if index == cut.whole_tokens else ""
        return orjson.dumps(text)[1:-1]

    def closing(self, *, include_usage: bool) -> bytes:
        """Render what comes after the last token."""
        done = b"data: [DONE]\n\n"
        if not include_usage:
            return done
        envelope = self._envelope(self.dialect.chunk_object)
        usage = orjson.dumps({**envelope, "choices": [], "usage": self._usage()})
        return b"data: %b\n\n%b" % (usage, done)

    def _event_start(self) -> bytes:
        envelope = orjson.dumps(self._envelope(self.dialect.chunk_object))
        return b'data: %b,"choices":[{"index":0,' % envelope[:-1]

    def _envelope(self, kind: str) -> dict[str, object]:
        return {
            "id": self.dialect.id_prefix + self.request_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": self.prompt_tokens + self.output_tokens,
        }


_EVENT_END = b',"logprobs":null,"finish_reason":null}]}\n\n'
