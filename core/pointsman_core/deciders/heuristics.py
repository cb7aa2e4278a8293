"""The heuristic deciders."""

import numpy as np

from pointsman_core.deciders.base import Scores
from pointsman_core.latency import drain_s, forecast
from pointsman_core.observation import Observation


class RandomChoice:
    """Every eligible endpoint with equal probability."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def score(self, seen: Observation) -> Scores:
        """Draw a random score for each."""
        return Scores(self._rng.random(len(seen.quality)))


class RoundRobin:
    """Each eligible endpoint in turn."""

    def __init__(self) -> None:
        self._next = 0

    def score(self, seen: Observation) -> Scores:
        """Prefer the endpoint that follows the last one chosen."""
        count = len(seen.quality)
        distance = (np.arange(count) - self._next) % count
        first = int(np.argmin(np.where(seen.eligible, distance, count)))
        self._next = (first + 1) % count
        return Scores(-distance.astype(np.float64))


class ShortestQueue:
    """Fewest requests present, waiting and running."""

    def score(self, seen: Observation) -> Scores:
        """Count the requests there."""
        present = seen.per_candidate(np.ones_like(seen.resident_limit_s)) + seen.foreign
        return Scores(-present)


class LeastLoad:
    """Shortest drain time: queued and in-flight tokens over the endpoint's speed."""

    def score(self, seen: Observation) -> Scores:
        """Predict the drain time, in seconds."""
        return Scores(-drain_s(seen))


class QualityGreedy:
    """Highest expected quality, whatever the load."""

    def score(self, seen: Observation) -> Scores:
        """Return the expected quality."""
        return Scores(seen.quality)


class LatencyQualityGreedy:
    """Highest expected quality among the endpoints where all limits would be kept.

    That is: the new request keeps its limits, and no request already there loses its limit
    per token by it (those late anyway do not count). Where no endpoint can do that, the one
    with the lowest predicted latency per token comes first.
    """

    def score(self, seen: Observation) -> Scores:
        """Score from 1 to 2 where limits are kept, below 1 elsewhere."""
        predicted = forecast(seen)
        in_time = predicted.keeps_limits(seen)
        late = 1.0 / (1.0 + predicted.per_token_s / seen.limit_s)
        return Scores(np.where(in_time, 1.0 + seen.quality, late), in_time)
