"""When to try again what failed: each thing by its own clock. Pure.

One tenant's quota must not make the statuses of all others wait.
"""

from collections.abc import Collection, Hashable
from dataclasses import dataclass, field
from typing import Final

FIRST_RETRY_S: Final = 0.5
LAST_RETRY_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class _Retry:
    at: float
    pause_s: float


@dataclass(slots=True)
class Retries:
    """Growing pauses by key. Times are seconds of any steady clock."""

    first_s: float = FIRST_RETRY_S
    last_s: float = LAST_RETRY_S
    _waiting: dict[Hashable, _Retry] = field(default_factory=dict)

    def due(self, key: Hashable, *, now: float) -> bool:
        """Whether it may be tried; what has never failed always may."""
        waiting = self._waiting.get(key)
        return waiting is None or waiting.at <= now

    def tried(self, key: Hashable, *, done: bool, now: float) -> None:
        """It was tried. What fails together is tried again together: give it the same time."""
        before = self._waiting.pop(key, None)
        if not done:
            pause = self.first_s if before is None else min(self.last_s, before.pause_s * 2)
            self._waiting[key] = _Retry(now + pause, pause)

    def keep(self, wanted: Collection[Hashable]) -> None:
        """Forget what nobody wants any more."""
        for key in self._waiting.keys() - set(wanted):
            del self._waiting[key]

    def wait_s(self, *, now: float) -> float:
        """Until the first is due; infinite when nothing waits."""
        return max(0.0, min((one.at for one in self._waiting.values()), default=float("inf")) - now)
