"""Whether the operator works: liveness and readiness. Pure.

An API server that is away is no reason to restart, it would only lose what is known. A
loop that hangs is one, and so is a watch that stays silent while lists find changes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from pointsman_operator.observed import Kind

STUCK_AFTER_S: Final = 120.0
"""A loop shows that it lives every few seconds; writes are bounded by time-outs."""
STALE_AFTER: Final = 2
"""Full lists in a row that found missed changes of a kind whose watch said nothing."""


@dataclass(slots=True)
class _Watch:
    events: int = 0
    silent_misses: int = 0


@dataclass(slots=True)
class Health:
    """Heartbeats of loops and the watches' record. Times are seconds of any steady clock."""

    synced: bool = False
    """Everything was listed once."""
    _beats: dict[str, float] = field(default_factory=dict)
    _watches: dict[Kind, _Watch] = field(default_factory=dict)

    def beat(self, loop: str, *, now: float) -> None:
        """A loop has come round."""
        self._beats[loop] = now

    def listed(self, events: Mapping[Kind, int], missed: Mapping[Kind, int]) -> None:
        """Everything was listed: watch events so far and missed changes, by kind."""
        for kind, count in events.items():
            watch = self._watches.setdefault(kind, _Watch())
            if count != watch.events:
                watch.silent_misses = 0
            elif missed.get(kind, 0):
                watch.silent_misses += 1
            watch.events = count

    @property
    def silent_watches(self) -> list[Kind]:
        """Kinds whose watch has missed changes and said nothing since."""
        return [kind for kind, watch in self._watches.items() if watch.silent_misses]

    def problems(self, *, now: float) -> list[str]:
        """Why the process should be restarted; empty when it should not."""
        stuck = [
            f"{loop} has not come round for {now - at:.0f} s"
            for loop, at in self._beats.items()
            if now - at > STUCK_AFTER_S
        ]
        stale = [
            f"the watch of {kind} misses changes"
            for kind, watch in self._watches.items()
            if watch.silent_misses >= STALE_AFTER
        ]
        return stuck + stale
