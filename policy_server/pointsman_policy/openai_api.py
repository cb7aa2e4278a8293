"""The part of the OpenAI HTTP API that routing touches: requests in, errors out.

Follows the API reference of chat completions, completions, models and errors
(platform.openai.com/docs/api-reference). Only what routing needs is read; everything
else in a request travels on untouched.
"""

import json
import re
from itertools import islice
from typing import Any, TypeVar

import orjson

from pointsman_core.records import record

_T = TypeVar("_T")

_MODEL_MEMBER = re.compile(rb'"model"\s*:\s*("(?:[^"\\]++|\\.)*+")', re.DOTALL)
"""A member ``model`` with a string value. Never inside a string: its quotes are escaped there."""

_ESCAPED_LETTER = rb"\u006"
"""How each letter of a key ``model`` must begin that is written with escapes."""

LONG_BODY_BYTES = 256 * 1024
"""From here on nothing is done to a body that takes longer than reading it once more."""

MAX_MODEL_MEMBERS = 1_000
"""Members ``model`` of a long body, nested ones included: beyond any use."""

MAX_MESSAGES = 10_000
"""Messages of one request, parts of them, or prompts: beyond any use, and quick to read."""

CHARS_PER_TOKEN = 4.0
"""Rule of thumb for English text; the router has no tokenizer of its own."""

WRITABLE_DEPTH = 250
"""A document of no more levels can always be written back (orjson stops at 254)."""

COMPLETION_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
MODELS_PATH = "/v1/models"


class ApiError(Exception):
    """A refusal in the API's own form.

    ``code`` is the machine-readable reason, also the label under which it is counted.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = headers

    @property
    def type(self) -> str:
        """The API's error type for the status."""
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> bytes:
        """The error object as JSON."""
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return orjson.dumps({"error": error})


@record
class CompletionRequest:
    """A chat completion or completion request, with its whole document."""

    model: str
    prompt: str
    prompt_tokens: int
    max_output_tokens: int | None
    streams: bool
    body: bytes
    model_at: tuple[int, int] | None = None
    """First byte of the value of ``model``, and the one behind it; None where only a parser
    tells."""

    def with_model(self, served_name: str) -> bytes:
        """The same request for another model; all else stays as it was, byte for byte.

        Only where the bytes alone do not tell which ``model`` is the request's own (nested
        ones, repeats, escaped letters) a short document is written anew, with every value kept.
        """
        if self.model_at is None:
            # Not by orjson: it turns integers beyond 64 bits into floats.
            document = json.loads(self.body) | {"model": served_name}
            return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
        start, end = self.model_at
        return self.body[:start] + orjson.dumps(served_name) + self.body[end:]


def _find_model(body: bytes) -> tuple[int, int] | None:
    """Where in a document the value of its own ``model`` is; None: not to be told by its bytes.

    Raises:
        ApiError: 400, it is not to be told and the document is too long to be written anew.

    """
    found = [m.span(1) for m in islice(_MODEL_MEMBER.finditer(body), MAX_MODEL_MEMBERS)]
    if len(found) == 1 and _ESCAPED_LETTER not in body:
        return found[0]
    return _own_model(body, found) if len(body) >= LONG_BODY_BYTES else None


def _own_model(body: bytes, found: list[tuple[int, int]]) -> tuple[int, int]:
    """Which of the values of members ``model`` is that of the document itself.

    Told by marking each and reading the document once more, where Python's own parser and
    writer would hold up all other requests for a second and longer.

    Raises:
        ApiError: 400, it is none of them.

    """
    marked: list[bytes] = []
    at = 0
    for i, (start, end) in enumerate(found):
        marked += [body[at:start], b"%d" % i]
        at = end
    document = orjson.loads(b"".join([*marked, body[at:]]))
    model = document["model"]
    if isinstance(model, int):  # a string is none that was marked
        return found[model]
    raise ApiError(
        400,
        "invalid_value",
        f"In a body of {LONG_BODY_BYTES // 1024} KiB and more `model` must be written without"
        f" escapes, and be the key of at most {MAX_MODEL_MEMBERS} members.",
        param="model",
    )


def parse_completion(body: bytes) -> CompletionRequest:
    """Read a request body.

    Raises:
        ApiError: 400, when it is not JSON or a field that routing needs is missing or of
            the wrong type.

    """
    document = _parse_object(body)
    prompt, tokens = _prompt(document)
    return CompletionRequest(
        model=_model(document),
        prompt=prompt,
        prompt_tokens=tokens,
        max_output_tokens=_max_output_tokens(document),
        streams=_stream(document),
        body=body,
        model_at=_find_model(body),
    )


def models_list(names: list[str]) -> bytes:
    """The body of ``GET /v1/models``."""
    return orjson.dumps({"object": "list", "data": [_model_object(name) for name in names]})


def model_object(name: str) -> bytes:
    """The body of ``GET /v1/models/{name}``."""
    return orjson.dumps(_model_object(name))


def unknown_model(name: str, available: list[str]) -> ApiError:
    """404 for a model name that no policy answers."""
    names = ", ".join(available) or "none"
    shown = name if len(name) <= 100 else f"{name[:100]}…"
    return ApiError(
        404,
        "model_not_found",
        f"The model `{shown}` does not exist. Available models: {names}.",
        param="model",
    )


def _model_object(name: str) -> dict[str, Any]:
    # The API wants a creation time; a routing policy has none that would mean anything.
    return {"id": name, "object": "model", "created": 0, "owned_by": "pointsman"}


def _parse_object(body: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(
            400, "invalid_json", f"The request body is not valid JSON: {error}."
        ) from None
    if not isinstance(document, dict):
        kind = type(document).__name__
        raise ApiError(
            400, "invalid_json", f"The request body must be a JSON object, not a {kind}."
        )
    # Reading allows deeper nesting than writing; only bodies with so many brackets can have it.
    if body.count(b"[") + body.count(b"{") > WRITABLE_DEPTH:
        _refuse_unwritable(document)
    return document


def _refuse_unwritable(document: dict[str, Any]) -> None:
    try:
        orjson.dumps(document)
    except orjson.JSONEncodeError:
        raise ApiError(400, "invalid_json", "The request body is nested too deeply.") from None


def _model(document: dict[str, Any]) -> str:
    model = document.get("model")
    if model is None:
        raise ApiError(400, "missing_model", "You must provide a `model`.", param="model")
    return _typed(model, str, "model", "a string")


def _stream(document: dict[str, Any]) -> bool:
    stream = document.get("stream")
    return False if stream is None else _typed(stream, bool, "stream", "a boolean")


def _max_output_tokens(document: dict[str, Any]) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):
        value = document.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise _wrong_type(name, "an integer of at least 1")
        if value < 1:
            message = f"Invalid value for `{name}`: expected an integer of at least 1."
            raise ApiError(400, "invalid_value", message, param=name)
        return value
    return None


def _prompt(document: dict[str, Any]) -> tuple[str, int]:
    """Text of the prompt, and its estimated length in tokens (at least 1)."""
    if "messages" in document:
        messages = _typed(document["messages"], list, "messages", "an array of objects")
        _check_count(len(messages), "messages", "entries")
        _check_count(sum(map(_part_count, messages)), "messages", "parts")
        text = "\n".join(_message_text(message, i) for i, message in enumerate(messages))
        return text, _estimate(text)
    if "prompt" in document:
        return _completion_prompt(document["prompt"])
    raise ApiError(
        400, "missing_prompt", "You must provide `messages` or a `prompt`.", param="messages"
    )


def _check_count(count: int, field: str, what: str) -> None:
    if count > MAX_MESSAGES:
        message = f"`{field}` has {count} {what}; at most {MAX_MESSAGES} are accepted."
        raise ApiError(400, "invalid_value", message, param=field)


def _part_count(message: object) -> int:
    content = message.get("content") if isinstance(message, dict) else None
    return len(content) if isinstance(content, list) else 0


def _message_text(message: object, index: int) -> str:
    field = f"messages[{index}]"
    content = _typed(message, dict, field, "an object").get("content")
    if content is None:  # an assistant's tool call has none
        return ""
    if isinstance(content, str):
        return content
    parts = _typed(content, list, f"{field}.content", "a string or an array of parts")
    return "\n".join(
        part["text"]
        for part in parts
        if isinstance(part, dict) and isinstance(part.get("text"), str)
    )


def _completion_prompt(prompt: object) -> tuple[str, int]:
    """A prompt is a string, token ids (exact length, no text), or a list of either."""
    if isinstance(prompt, str):
        return prompt, _estimate(prompt)
    items = _typed(prompt, list, "prompt", "a string or an array")
    if items and set(map(type, items)) <= {int, bool}:
        return "", len(items)
    _check_count(len(items), "prompt", "entries")
    text = "\n".join(item for item in items if isinstance(item, str))
    ids = sum(len(item) for item in items if isinstance(item, list))
    return text, ids or _estimate(text)


def _estimate(text: str) -> int:
    return max(1, round(len(text) / CHARS_PER_TOKEN))


def _typed(value: object, kind: type[_T], field: str, wanted: str) -> _T:
    if not isinstance(value, kind):
        raise _wrong_type(field, wanted)
    return value


def _wrong_type(field: str, wanted: str) -> ApiError:
    return ApiError(
        400, "invalid_type", f"Invalid type for `{field}`: expected {wanted}.", param=field
    )
