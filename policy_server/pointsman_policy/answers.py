"""Counts the tokens of an answer while its bytes pass by.

Pure and bounded in memory. A streamed answer is server-sent events, one token each as
engines send them; where the answer carries a ``usage`` object, that one is exact and wins.
"""

import re
from typing import Any, Protocol

import orjson

TAIL_BYTES = 16 * 1024
"""How much of the end of a whole answer is kept to find its usage."""

MAX_EVENT_BYTES = 1024 * 1024
"""A longer event is dropped uncounted rather than kept in memory."""

_COMPLETION_TOKENS = re.compile(rb'"completion_tokens"\s*:\s*(\d{1,9})\b')


class TokenCounter(Protocol):
    """Takes an answer piece by piece."""

    @property
    def total(self) -> int:
        """Tokens of the answer so far; exact once usage was seen."""
        ...

    @property
    def failed(self) -> bool:
        """Whether the answer says of itself that it failed."""
        ...

    def feed(self, chunk: bytes) -> int:
        """Take in the next bytes; returns how many new tokens they brought."""
        ...


class StreamCounter:
    """`TokenCounter` of server-sent events."""

    def __init__(self) -> None:
        self._rest = b""
        self._events = 0
        self._usage: int | None = None
        self._failed = False

    @property
    def failed(self) -> bool:
        """Whether an event was an error: engines fail so once the status is out."""
        return self._failed

    @property
    def total(self) -> int:
        """Tokens so far: the usage if it was told, else the events with content."""
        return self._events if self._usage is None else self._usage

    def feed(self, chunk: bytes) -> int:
        """Count the events that end within these bytes."""
        *lines, rest = (self._rest + chunk).split(b"\n")
        self._rest = rest if len(rest) <= MAX_EVENT_BYTES else b""
        new = sum(self._take(line) for line in lines if line.startswith(b"data:"))
        self._events += new
        return new

    def _take(self, line: bytes) -> bool:
        try:
            event = orjson.loads(line[5:])
        except orjson.JSONDecodeError:  # [DONE], or not ours to judge
            return False
        if not isinstance(event, dict):
            return False
        self._failed = self._failed or bool(event.get("error"))
        usage = event.get("usage")
        told = usage.get("completion_tokens") if isinstance(usage, dict) else None
        if isinstance(told, int) and told >= 0:
            self._usage = told
        choices = event.get("choices")
        return isinstance(choices, list) and any(_has_content(choice) for choice in choices)


class WholeCounter:
    """`TokenCounter` of an answer that comes as one JSON document."""

    failed = False
    """Its status tells."""

    def __init__(self) -> None:
        self._tail = b""

    @property
    def total(self) -> int:
        """Tokens by the usage at the answer's end, 0 until it is there."""
        found = _COMPLETION_TOKENS.findall(self._tail)
        return int(found[-1]) if found else 0

    def feed(self, chunk: bytes) -> int:
        """Keep the tail; a whole answer brings no token before its end."""
        self._tail = (self._tail + chunk)[-TAIL_BYTES:]
        return 0


def counter_for(content_type: str) -> TokenCounter:
    """The counter that fits an answer's content type."""
    if content_type.startswith("text/event-stream"):
        return StreamCounter()
    return WholeCounter()


_DELTA_FIELDS = ("content", "reasoning_content", "reasoning", "tool_calls", "refusal")


def _has_content(choice: Any) -> bool:  # noqa: ANN401 - whatever an engine sends
    if not isinstance(choice, dict):
        return False
    delta = choice.get("delta")
    if isinstance(delta, dict):
        return any(delta.get(field) for field in _DELTA_FIELDS)
    return bool(choice.get("text"))
