"""How the policies did lately: counts over a sliding window, for the operator to read.

Pure. A request counts when it ends, so that the parts of a sum are of the same requests.
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Final

WINDOW_S: Final = 300.0
BUCKETS: Final = 60
"""The window slides in so many steps."""


@dataclass(slots=True)
class Totals:
    """Requests that ended within some time."""

    requests: int = 0
    """Completed, failed and rejected ones."""
    violations: int = 0
    """Completed over their limit."""
    rejected: int = 0
    """No endpoint was chosen."""
    failed: int = 0
    """Answered by an error, or broken off by either side."""
    predicted_qos_sum: float = 0.0
    """Predicted quality of those in time, 0 for all others."""

    def add(self, other: "Totals") -> None:
        """Add field by field."""
        for field in fields(self):
            name = field.name
            setattr(self, name, getattr(self, name) + getattr(other, name))


class SlidingWindow:
    """Totals of the last ``window_s`` seconds, to within one bucket.

    Times must not go backwards. Memory is bounded by the number of buckets.
    """

    def __init__(self, *, window_s: float = WINDOW_S, buckets: int = BUCKETS) -> None:
        self._count = buckets
        self._bucket_s = window_s / buckets
        self._buckets: deque[tuple[int, Totals]] = deque()

    def bucket(self, *, now_s: float) -> Totals:
        """The bucket to count in now."""
        index = self._prune(now_s)
        if not self._buckets or self._buckets[-1][0] != index:
            self._buckets.append((index, Totals()))
        return self._buckets[-1][1]

    def totals(self, *, now_s: float) -> Totals:
        """The sum over the window that ends now."""
        self._prune(now_s)
        total = Totals()
        for _, bucket in self._buckets:
            total.add(bucket)
        return total

    def _prune(self, now_s: float) -> int:
        index = int(now_s // self._bucket_s)
        while self._buckets and self._buckets[0][0] <= index - self._count:
            self._buckets.popleft()
        return index


class PolicyStatistics:
    """One sliding window per policy, by ``namespace/name``."""

    def __init__(self, *, window_s: float = WINDOW_S) -> None:
        self.window_s = window_s
        self._windows: dict[str, SlidingWindow] = {}

    def completed(self, policy: str, *, quality: float, in_time: bool, now_s: float) -> None:
        """A whole answer passed; ``quality`` is what was predicted of it."""
        bucket = self._bucket(policy, now_s)
        if in_time:
            bucket.predicted_qos_sum += quality
        else:
            bucket.violations += 1

    def failed(self, policy: str, *, now_s: float) -> None:
        """A request was answered by an error, or broken off."""
        self._bucket(policy, now_s).failed += 1

    def rejected(self, policy: str, *, now_s: float) -> None:
        """No endpoint was chosen for a request."""
        self._bucket(policy, now_s).rejected += 1

    def totals(self, policy: str, *, now_s: float) -> Totals:
        """The window that ends now; zeros for a policy without requests."""
        window = self._windows.get(policy)
        return Totals() if window is None else window.totals(now_s=now_s)

    def retain(self, policies: Collection[str]) -> None:
        """Forget all others: one of the same name that comes later starts from zero."""
        self._windows = {name: self._windows[name] for name in self._windows if name in policies}

    def _bucket(self, policy: str, now_s: float) -> Totals:
        window = self._windows.get(policy)
        if window is None:
            window = self._windows[policy] = SlidingWindow(window_s=self.window_s)
        bucket = window.bucket(now_s=now_s)
        bucket.requests += 1
        return bucket
