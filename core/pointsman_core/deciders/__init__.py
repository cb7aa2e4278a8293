"""Deciders: algorithms that score the candidates of one request.

A decider only scores; choosing, admission and tie-breaking are the same for all and live
in `pointsman_core.router`.
"""

from collections.abc import Callable, Mapping

import numpy as np

from pointsman_core.deciders.base import Decider, Scores
from pointsman_core.deciders.heuristics import (
    BestExpert,
    LatencyQualityGreedy,
    LeastLoad,
    QualityGreedy,
    RandomChoice,
    RoundRobin,
    ScoreWeights,
    ShortestQueue,
    WeightedScore,
)
from pointsman_core.deciders.impact import ImpactGreedy, ImpactParameters, expected_impact
from pointsman_core.resources import Algorithm

__all__ = [
    "ADMISSION_MARGINS",
    "BestExpert",
    "Decider",
    "ImpactGreedy",
    "ImpactParameters",
    "LatencyQualityGreedy",
    "LeastLoad",
    "QualityGreedy",
    "RandomChoice",
    "RoundRobin",
    "ScoreWeights",
    "Scores",
    "ShortestQueue",
    "WeightedScore",
    "expected_impact",
    "make_decider",
]


def _han_drl() -> Decider:
    # Imported late: the graph that it decides by is made of other deciders' terms.
    from pointsman_core.deciders.han_drl import shipped_decider

    return shipped_decider()


_FACTORIES: Mapping[Algorithm, Callable[[np.random.Generator], Decider]] = {
    Algorithm.RANDOM: RandomChoice,
    Algorithm.ROUND_ROBIN: lambda _: RoundRobin(),
    Algorithm.SHORTEST_QUEUE: lambda _: ShortestQueue(),
    Algorithm.LEAST_LOAD: lambda _: LeastLoad(),
    Algorithm.QUALITY_GREEDY: lambda _: QualityGreedy(),
    Algorithm.BEST_EXPERT: lambda _: BestExpert(),
    Algorithm.WEIGHTED_SCORE: lambda _: WeightedScore(),
    Algorithm.LATENCY_QUALITY_GREEDY: lambda _: LatencyQualityGreedy(),
    Algorithm.IMPACT_GREEDY: lambda _: ImpactGreedy(),
    Algorithm.HAN_DRL: lambda _: _han_drl(),
}


ADMISSION_MARGINS: Mapping[Algorithm, float] = {
    Algorithm.RANDOM: 1.04,
    Algorithm.ROUND_ROBIN: 1.11,
    Algorithm.SHORTEST_QUEUE: 1.11,
    Algorithm.LEAST_LOAD: 0.887,
    Algorithm.QUALITY_GREEDY: 1.11,
    Algorithm.BEST_EXPERT: 1.11,
    Algorithm.WEIGHTED_SCORE: 0.668,
}
"""Under ``Reject``: what predicted latencies are multiplied by in the common check.

For deciders that say nothing of admission themselves; 1 where nothing stands here. Tuned for
each, see docs/deciders.md.
"""


def make_decider(algorithm: Algorithm, rng: np.random.Generator) -> Decider:
    """A fresh decider; ``rng`` is the only source of chance.

    HanDrl has the shipped model; another one is put in by `Router.replace_decider`.
    """
    return _FACTORIES[algorithm](rng)
