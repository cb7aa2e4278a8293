"""The heuristic deciders."""

from dataclasses import dataclass

import numpy as np

from pointsman_core.deciders.base import Scores
from pointsman_core.latency import drain_s, forecast
from pointsman_core.observation import Observation
from pointsman_core.state import FloatArray

LATENCY_QUALITY_MARGIN = 1.21
LATENCY_QUALITY_ADMISSION_MARGIN = 1.21
"""Both tuned, see docs/deciders.md."""
MOST_LATENCY = 2.0
"""Twice the limit is as bad as it gets, so that quality still counts among late ones."""
TINY = 1e-9


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


class BestExpert:
    """The expert that is best on average, whatever the prompt and the load.

    Best by the mean of the predictions so far, which is the declared default where nothing
    else is known; it settles after a few requests.
    """

    def __init__(self) -> None:
        self._sum: FloatArray | float = 0.0
        self._count = 0

    def score(self, seen: Observation) -> Scores:
        """Return the mean of the expected qualities of all requests so far."""
        self._sum = self._sum + seen.quality
        self._count += 1
        return Scores(self._sum / self._count)


class LatencyQualityGreedy:
    """Highest expected quality among the endpoints where all limits would be kept.

    That is: the new request keeps its limits, and no request already there loses its limit
    per token by it (those late anyway do not count). Where no endpoint can do that, the one
    with the lowest predicted latency per token comes first.

    ``margin`` multiplies predicted latencies before they are compared with limits for the
    score, ``admission_margin`` before they are for admission under ``Reject``.
    """

    def __init__(
        self,
        margin: float = LATENCY_QUALITY_MARGIN,
        admission_margin: float = LATENCY_QUALITY_ADMISSION_MARGIN,
    ) -> None:
        for name, value in (("margin", margin), ("admission_margin", admission_margin)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self.margin = margin
        self.admission_margin = admission_margin

    def score(self, seen: Observation) -> Scores:
        """Score from 1 to 2 where limits are kept, below 1 elsewhere."""
        predicted = forecast(seen)
        in_time = predicted.keeps_limits(seen, margin=self.margin)
        acceptable = predicted.keeps_limits(seen, margin=self.admission_margin)
        late = 1.0 / (1.0 + predicted.per_token_s / seen.limit_s)
        return Scores(np.where(in_time, 1.0 + seen.quality, late), in_time, acceptable)


@dataclass(frozen=True, slots=True)
class ScoreWeights:
    """What counts how much; not negative, of any sum, for they are normalised to 1."""

    quality: float = 0.385
    latency: float = 0.615
    load: float = 0.0

    def normalised(self) -> tuple[float, float, float]:
        """Quality, latency and load on the simplex.

        Raises:
            ValueError: a weight is negative or not finite, or all are 0.

        """
        weights = (self.quality, self.latency, self.load)
        total = sum(weights)
        if not (min(weights) >= 0 and 0 < total < float("inf")):
            raise ValueError(f"weights must be finite, not negative and not all 0, got {weights}")
        return (self.quality / total, self.latency / total, self.load / total)


TUNED_WEIGHTS = ScoreWeights()
"""The defaults: tuned, see docs/deciders.md."""


class WeightedScore:
    """Weighted sum of expected quality, predicted latency and load.

    After route-balance (arXiv 2606.17949), which weighs quality, latency and cost on the
    simplex; its learned predictors are replaced by ours, so that deciders differ in nothing
    but the rule.
    """

    def __init__(self, weights: ScoreWeights = TUNED_WEIGHTS) -> None:
        self._quality, self._latency, self._load = weights.normalised()

    def score(self, seen: Observation) -> Scores:
        """Score from -1 to 1: latency as a share of the limit, load of the busiest endpoint."""
        latency = np.minimum(forecast(seen).per_token_s / seen.limit_s, MOST_LATENCY)
        drain = drain_s(seen)
        load = drain / max(float(drain.max(initial=0.0)), TINY)
        return Scores(
            self._quality * seen.quality
            - self._latency * latency / MOST_LATENCY
            - self._load * load
        )
