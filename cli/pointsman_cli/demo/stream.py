"""Server-sent events of an OpenAI-compatible engine, timed token by token."""

from dataclasses import dataclass, field

import orjson

DONE = b"[DONE]"


class SseParser:
    """Splits a byte stream into the data of its events; one ``data:`` line is one event."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """Data of all lines that the chunk completes."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


@dataclass(slots=True)
class AnswerMeter:
    """Counts and times what comes in; times are seconds on the caller's clock."""

    first_token_s: float | None = None
    last_token_s: float | None = None
    chunks: int = 0
    """Chunks that carried text."""
    usage_tokens: int | None = None
    """Length of the answer as the engine counted it."""
    finish_reason: str | None = None
    model: str | None = None
    error: str | None = None
    """Message of an error that came inside the stream."""
    done: bool = False
    _parser: SseParser = field(default_factory=SseParser, repr=False)

    @property
    def output_tokens(self) -> int:
        """The engine's own count, else one per chunk."""
        return self.chunks if self.usage_tokens is None else self.usage_tokens

    @property
    def complete(self) -> bool:
        """Whether the answer came to its regular end."""
        return self.done and self.finish_reason is not None and self.error is None

    def feed(self, chunk: bytes, now_s: float) -> None:
        """Take in bytes that arrived at ``now_s``."""
        for data in self._parser.feed(chunk):
            if data == DONE:
                self.done = True
            else:
                self._event(data, now_s)

    def _event(self, data: bytes, now_s: float) -> None:
        try:
            event = orjson.loads(data)
        except orjson.JSONDecodeError:
            self.error = f"not JSON in the stream: {data[:80]!r}"
            return
        if not isinstance(event, dict):
            self.error = f"not an object in the stream: {data[:80]!r}"
            return
        if error := event.get("error"):
            self.error = str(error.get("message") if isinstance(error, dict) else error)
            return
        self.model = event.get("model") or self.model
        usage = event.get("usage")
        told = usage.get("completion_tokens") if isinstance(usage, dict) else None
        if isinstance(told, int) and told >= 0:
            self.usage_tokens = told
        choices = event.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                self._choice(choice, now_s)

    def _choice(self, choice: dict[str, object], now_s: float) -> None:
        self.finish_reason = str(choice.get("finish_reason") or "") or self.finish_reason
        delta = choice.get("delta")
        text = delta.get("content") if isinstance(delta, dict) else choice.get("text")
        # An engine may send empty text when a token ends inside a character; the role
        # chunk, which is no token, is the one that names the role.
        if text is None or (isinstance(delta, dict) and "role" in delta and not text):
            return
        if choice.get("finish_reason") and not text:
            return
        self.chunks += 1
        self.first_token_s = now_s if self.first_token_s is None else self.first_token_s
        self.last_token_s = now_s
