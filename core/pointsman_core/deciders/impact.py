"""ImpactGreedy: what a choice gains, less what it costs those who are there already.

Ours. The expected quality of an answer counts only as far as it will probably be in time,
and the same is true of every request in flight: a choice is worth the expected QoS of the
new request plus the change that it makes in the expected QoS of the others there.
"""

from dataclasses import dataclass

import numpy as np

from pointsman_core.deciders.base import Scores
from pointsman_core.latency import LatencyForecast, forecast
from pointsman_core.observation import Observation
from pointsman_core.records import record
from pointsman_core.state import FloatArray


@dataclass(frozen=True, slots=True)
class ImpactParameters:
    """Tuned for average QoS under both admission rules; see docs/deciders.md for how."""

    margin: float = 1.2
    """Predicted latencies are multiplied by this: more requests will come."""
    softness: float = 0.28
    """Spread of the prediction as a share of the limit; 0 would be a hard check."""
    impact_weight: float = 1.9
    """What a change to those already there counts; it stands for that of later ones too."""
    least_value: float = 0.082
    """Under ``Reject`` a request that is worth less than this is refused."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            ValueError: margin or softness is not positive, or a value is not finite.

        """
        values = (self.margin, self.softness, self.impact_weight, self.least_value)
        if not np.isfinite(values).all():
            raise ValueError(f"ImpactParameters must be finite, got {values}")
        if self.margin <= 0 or self.softness <= 0:
            raise ValueError(
                f"margin and softness must be positive, got {self.margin} and {self.softness}"
            )


TUNED = ImpactParameters()
"""The defaults."""


@record
class Impact:
    """What each choice does, in expected QoS."""

    in_time: FloatArray
    """(E,) chance that the new request keeps its limits."""
    own: FloatArray
    """(E,) expected QoS of the new request."""
    others: FloatArray
    """(E,) change of the summed expected QoS of the requests there; at most 0 or near it."""
    before: FloatArray
    """(R,) chance that a request there keeps its limit if the new one goes elsewhere."""
    after: FloatArray
    """(R,) the same if the new one joins its endpoint."""
    forecast: LatencyForecast


def expected_impact(seen: Observation, parameters: ImpactParameters = TUNED) -> Impact:
    """Predict what each choice does to the QoS of the new request and of those there."""
    predicted = forecast(seen)
    chance = _chance(predicted.per_token_s, seen.limit_s, parameters)
    if np.isfinite(seen.first_token_limit_s):
        first = _chance(predicted.first_token_s, seen.first_token_limit_s, parameters)
        chance = np.minimum(chance, first)
    both = np.empty((2, len(seen.resident_limit_s)))
    both[0], both[1] = predicted.resident_before_s, predicted.resident_after_s
    chances = _chance(both, seen.resident_limit_s, parameters)
    before, after = chances[0], chances[1]
    return Impact(
        in_time=chance,
        own=seen.quality * chance,
        others=seen.per_candidate(seen.resident_quality * (after - before)),
        before=before,
        after=after,
        forecast=predicted,
    )


class ImpactGreedy:
    """Highest expected QoS of the new request plus weighted change to the others' there."""

    def __init__(self, parameters: ImpactParameters = TUNED) -> None:
        self.parameters = parameters

    def score(self, seen: Observation) -> Scores:
        """Score by the value of each choice, in units of QoS."""
        impact = expected_impact(seen, self.parameters)
        values = impact.own + self.parameters.impact_weight * impact.others
        return Scores(
            values,
            in_time=impact.in_time >= 0.5,
            acceptable=values >= self.parameters.least_value,
            parts={"chance in time": impact.in_time, "impact on others": impact.others},
        )


MOST_LATE = 500.0
"""Keeps exp() in range; far beyond it chances still differ, so that best effort has an order."""

# As arrays: NumPy would make them of Python's numbers at each call.
_ONE, _MOST_LATE = np.array(1.0), np.array(MOST_LATE)


def _chance(
    predicted_s: FloatArray, limit_s: FloatArray | float, parameters: ImpactParameters
) -> FloatArray:
    """Chance that a predicted latency turns out within its limit."""
    late = (parameters.margin * predicted_s / limit_s - _ONE) / parameters.softness
    result: FloatArray = _ONE / (_ONE + np.exp(np.minimum(late, _MOST_LATE)))
    return result
