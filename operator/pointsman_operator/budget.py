"""How many Events an object may cause, so that one that flaps fills nobody's etcd. Pure.

The numbers are those of client-go's spam filter: kubelet and controllers keep to them too.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Final

BURST: Final = 25
REFILL_S: Final = 300.0
"""One more after so long."""


@dataclass(slots=True)
class EventBudget:
    """A token bucket per object. Times are seconds of any steady clock."""

    burst: int = BURST
    refill_s: float = REFILL_S
    _spent: dict[Hashable, tuple[float, float]] = field(default_factory=dict)
    """Events that count, and when that was so."""

    def spend(self, key: Hashable, *, now: float) -> bool:
        """Whether the object may cause one more; it counts then."""
        spent = self._left_over(key, now=now)
        allowed = spent + 1 <= self.burst
        self._spent[key] = (spent + allowed, now)
        return allowed

    def forget(self, *, now: float) -> None:
        """Drop objects that are quiet again, or gone."""
        for key in [one for one in self._spent if not self._left_over(one, now=now)]:
            del self._spent[key]

    def _left_over(self, key: Hashable, *, now: float) -> float:
        spent, at = self._spent.get(key, (0.0, now))
        return max(0.0, spent - (now - at) / self.refill_s)
