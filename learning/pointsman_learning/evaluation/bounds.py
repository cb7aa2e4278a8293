"""What could be had with knowledge that no router has. Bounds, never deciders of the product.

Two kinds, both upper marks for judging others rather than true upper bounds of the problem:

1. *Informed*: ImpactGreedy that is told true qualities, true lengths, or both.
2. *Lookahead*: at each decision every action is tried on a copy of the simulation, under the
   requests that will truly come and with their true lengths; ImpactGreedy decides the next
   ones, then everything drains, and the action with the highest sum of QoS is taken.
   One step of policy improvement over ImpactGreedy, with the future known.

A lookahead costs about (actions) x (horizon) decisions of ImpactGreedy for each request:
with seven actions and a horizon of 60 about 0.1 s per request, so minutes for a window.
Windows are independent of each other: run them in parallel.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from pointsman_core.deciders import Decider, ImpactGreedy, Scores
from pointsman_core.observation import Observation, RoutingTable, observe
from pointsman_core.resources import Admission
from pointsman_core.state import FloatArray
from pointsman_learning.simulator import ReplayPredictor, Simulation, core_request, simulate
from pointsman_learning.simulator.scenario import REJECTED, Outcome, Scenario, qos_of

HORIZON = 60
"""Decisions that are played on after the one in question."""


def informed(scenario: Scenario, seed: int = 0, *, quality: bool, lengths: bool) -> Outcome:
    """ImpactGreedy with true quality, true lengths, or both, in place of predictions."""
    told = _told(scenario, quality=quality, lengths=lengths)
    outcome = simulate(told, ImpactGreedy(), seed=seed)
    return replace(outcome, scenario=scenario)


def _told(scenario: Scenario, *, quality: bool, lengths: bool) -> Scenario:
    told = scenario
    if quality:
        told = replace(told, predicted_quality=scenario.score)
    if lengths:
        told = replace(told, predicted_output_tokens=scenario.output_tokens.astype(np.float64))
    return told


def lookahead(
    scenario: Scenario,
    seed: int = 0,  # noqa: ARG001 - as all bounds are called; nothing here is random
    *,
    quality: bool,
    horizon: int = HORIZON,
) -> Outcome:
    """One-step lookahead over ImpactGreedy that knows arrivals and lengths to come.

    ``quality``: whether true qualities are known too, else predicted ones are maximised.
    """
    told = _told(scenario, quality=quality, lengths=True)
    simulation = Simulation(told)
    rule = _Rule.of(told, simulation)
    for i, arrival in enumerate(told.arrival_s.tolist()):
        simulation.advance(arrival)
        _apply(simulation, i, _best_action(rule, simulation, i, horizon))
    return replace(simulation.finish(), scenario=scenario)


@dataclass(frozen=True, slots=True)
class _Rule:
    """ImpactGreedy as the router would apply it, ties aside, on any copy of a simulation."""

    scenario: Scenario
    table: RoutingTable
    decider: Decider

    @classmethod
    def of(cls, scenario: Scenario, simulation: Simulation) -> "_Rule":
        table = RoutingTable(scenario.snapshot, simulation.state, ReplayPredictor(scenario))
        return cls(scenario, table, ImpactGreedy())

    def look(self, simulation: Simulation, i: int) -> tuple[Observation, Scores]:
        request = core_request(self.scenario, i)
        seen = observe(self.table, simulation.state, request, now_s=simulation.now_s)
        return seen, self.decider.score(seen)

    def choose(self, simulation: Simulation, i: int) -> int:
        """Endpoint or `REJECTED`."""
        seen, scores = self.look(simulation, i)
        if not seen.eligible.any():
            return REJECTED
        best = int(np.where(seen.eligible, scores.values, -np.inf).argmax())
        if self.rejects and scores.acceptable is not None and not scores.acceptable[best]:
            return REJECTED
        return best

    @property
    def rejects(self) -> bool:
        return self.scenario.snapshot.admission is Admission.REJECT


def _best_action(rule: _Rule, simulation: Simulation, i: int, horizon: int) -> int:
    """Try every action; what ImpactGreedy would do wins among equals."""
    usual = rule.choose(simulation, i)
    seen, _ = rule.look(simulation, i)
    actions = [usual, *np.flatnonzero(seen.eligible).tolist()]
    if rule.rejects:
        actions.append(REJECTED)
    actions = list(dict.fromkeys(actions))
    if len(actions) == 1:
        return usual
    last = min(i + horizon, len(rule.scenario) - 1)
    values = [_play_on(rule, simulation.clone(), i, action, last) for action in actions]
    return actions[int(np.argmax(values))]


def _play_on(rule: _Rule, branch: Simulation, i: int, action: int, last: int) -> float:
    """Sum of QoS of all requests up to ``last`` if request ``i`` is treated so."""
    _apply(branch, i, action)
    for later in range(i + 1, last + 1):
        branch.advance(float(rule.scenario.arrival_s[later]))
        _apply(branch, later, rule.choose(branch, later))
    branch.advance(np.inf)
    return float(_qos(rule.scenario, branch, last + 1).sum())


def _apply(simulation: Simulation, request: int, action: int) -> None:
    if action == REJECTED:
        simulation.reject(request)
    else:
        simulation.submit(request, action)


def _qos(scenario: Scenario, simulation: Simulation, count: int) -> FloatArray:
    """(count,) QoS of the first requests by the quality that the scenario predicts."""
    return qos_of(
        scenario,
        np.arange(count),
        endpoint=simulation.endpoint[:count],
        first_token_s=simulation.first_token_s[:count],
        finish_s=simulation.finish_s[:count],
        quality=scenario.predicted_quality,
    )


BOUNDS: Mapping[str, Callable[[Scenario, int], Outcome]] = {
    "bound:true-lengths": partial(informed, quality=False, lengths=True),
    "bound:true-quality": partial(informed, quality=True, lengths=False),
    "bound:true-both": partial(informed, quality=True, lengths=True),
    "bound:lookahead": partial(lookahead, quality=False),
    "bound:lookahead-true-quality": partial(lookahead, quality=True),
}
"""By name; the quick ones first."""
