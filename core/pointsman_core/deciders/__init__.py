"""Deciders: algorithms that score the candidates of one request.

A decider only scores; choosing, admission and tie-breaking are the same for all and live
in `pointsman_core.router`.
"""

from collections.abc import Callable, Mapping

import numpy as np

from pointsman_core.deciders.base import Decider, Scores
from pointsman_core.deciders.heuristics import (
    LatencyQualityGreedy,
    LeastLoad,
    QualityGreedy,
    RandomChoice,
    RoundRobin,
    ShortestQueue,
)
from pointsman_core.resources import Algorithm

__all__ = ["Decider", "Scores", "make_decider"]

_FACTORIES: Mapping[Algorithm, Callable[[np.random.Generator], Decider]] = {
    Algorithm.RANDOM: RandomChoice,
    Algorithm.ROUND_ROBIN: lambda _: RoundRobin(),
    Algorithm.SHORTEST_QUEUE: lambda _: ShortestQueue(),
    Algorithm.LEAST_LOAD: lambda _: LeastLoad(),
    Algorithm.QUALITY_GREEDY: lambda _: QualityGreedy(),
    Algorithm.LATENCY_QUALITY_GREEDY: lambda _: LatencyQualityGreedy(),
}


def make_decider(algorithm: Algorithm, rng: np.random.Generator) -> Decider:
    """A fresh decider; ``rng`` is the only source of chance."""
    return _FACTORIES[algorithm](rng)
