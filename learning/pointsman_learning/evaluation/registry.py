"""The one registry of what can be evaluated: the product's deciders, and bounds.

A contender turns a scenario into an outcome. Every `Algorithm` of core that can be made is
one; bounds see what no router can (true quality, the future), so their names start with
``bound:`` and they are never a reference. `register` adds others, such as a trained model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from pointsman_core.deciders import Decider, make_decider
from pointsman_core.resources import Algorithm
from pointsman_learning.evaluation.bounds import BOUNDS
from pointsman_learning.simulator import simulate
from pointsman_learning.simulator.scenario import Outcome, Scenario

BOUND = "bound:"
"""How the names of bounds start."""

LOOKAHEAD = "bound:lookahead"
"""How the names of the slow bounds start."""
LOOKAHEAD_MS = 120.0
"""Rough time of a lookahead for one request."""

Play = Callable[[Scenario, int], Outcome]
"""Plays a scenario with a seed for the decider's own chance."""


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that decides a whole scenario."""

    name: str
    play: Play
    baseline: bool = True
    """Whether it may be chosen as the best baseline; learned policies and bounds may not."""
    ms_per_request: float = 0.3
    """Rough time to simulate and decide one request, for the first estimate only."""

    @property
    def bound(self) -> bool:
        """Whether it sees what no router can."""
        return self.name.startswith(BOUND)


_REGISTERED: dict[str, Contender] = {}


def register(contender: Contender) -> None:
    """Add one, or replace the one of that name, in this process.

    Worker processes import modules afresh: register when a module is imported, or give
    `run_all` what can be sent to them.
    """
    _REGISTERED[contender.name] = contender


@contextmanager
def registered(extra: Iterable[Contender]) -> Iterator[None]:
    """Have these in this process for a while."""
    before = dict(_REGISTERED)
    try:
        for contender in extra:
            register(contender)
        yield
    finally:
        _REGISTERED.clear()
        _REGISTERED.update(before)


def from_decider(
    name: str, make: Callable[[Scenario, int], Decider], *, ms_per_request: float = 0.3
) -> Contender:
    """A contender that is not a baseline, from a decider made anew for every run."""

    def play(scenario: Scenario, seed: int) -> Outcome:
        return simulate(scenario, make(scenario, seed), seed=seed)

    return Contender(name, play, baseline=False, ms_per_request=ms_per_request)


def contenders() -> Mapping[str, Contender]:
    """All by name, bounds last."""
    found = {a.value: _of_algorithm(a) for a in Algorithm if _is_made_without_a_model(a)}
    return found | _REGISTERED | {bound.name: bound for bound in _bounds()}


def _of_algorithm(algorithm: Algorithm) -> Contender:
    def play(scenario: Scenario, seed: int) -> Outcome:
        snapshot = scenario.snapshot.model_copy(update={"algorithm": algorithm})
        return simulate(replace(scenario, snapshot=snapshot), seed=seed)

    return Contender(algorithm.value, play, baseline=algorithm is not Algorithm.HAN_DRL)


def _is_made_without_a_model(algorithm: Algorithm) -> bool:
    try:
        make_decider(algorithm, np.random.default_rng(0))
    except KeyError:
        return False
    return True


def _bounds() -> list[Contender]:
    return [
        Contender(
            name,
            play,
            baseline=False,
            ms_per_request=LOOKAHEAD_MS if name.startswith(LOOKAHEAD) else 0.3,
        )
        for name, play in BOUNDS.items()
    ]
