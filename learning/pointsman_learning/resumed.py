"""What a run that goes on must have in common with the one that was broken off."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

_ABSENT = object()


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings that differ, each as ``warm.epochs: 6 → 8``; both are plain data, as in JSON."""
    return list(_differences(was, now, ""))


def _differences(was: Mapping[str, Any], now: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name in dict.fromkeys([*was, *now]):
        before, after = was.get(name, _ABSENT), now.get(name, _ABSENT)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name}: {_told(before)} → {_told(after)}"


def _told(value: object) -> str:
    if value is _ABSENT:
        return "not set"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
