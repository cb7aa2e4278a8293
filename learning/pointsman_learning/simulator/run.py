"""A whole scenario decided by core's own router."""

from collections.abc import Callable

import numpy as np

from pointsman_core.deciders import Decider
from pointsman_core.observation import Request
from pointsman_core.prediction import Prediction
from pointsman_core.router import Decision, Router
from pointsman_learning.simulator.scenario import Outcome, Scenario
from pointsman_learning.simulator.simulation import Simulation

OnDecision = Callable[[Simulation, int, Decision], None]
"""Told the simulation as the router saw it, the request, and what was decided."""


class DeciderFailedError(RuntimeError):
    """A decider raised or gave nonsense.

    In service its fallback takes over; here that would judge another algorithm in its name.
    """


def core_request(scenario: Scenario, i: int) -> Request:
    """Request ``i`` as a router knows it; its number stands for its text."""
    first_token = scenario.first_token_limit_s
    return Request(
        prompt=str(i),
        prompt_tokens=int(scenario.prompt_tokens[i]),
        arrival_s=float(scenario.arrival_s[i]),
        limit_s=float(scenario.limit_s[i]),
        first_token_limit_s=np.inf if first_token is None else float(first_token[i]),
    )


class ReplayPredictor:
    """Core `Predictor` that answers a scenario's predictions for a `core_request`."""

    def __init__(self, scenario: Scenario) -> None:
        self._quality = scenario.predicted_quality.astype(np.float64)
        self._output = scenario.predicted_output_tokens.astype(np.float64)
        self._learned = np.ones(scenario.endpoints, np.bool_)
        for array in (self._quality, self._output, self._learned):
            array.flags.writeable = False

    def predict(self, prompt: str) -> Prediction:
        """Look up the request's row.

        Raises:
            ValueError: the prompt is no request's number.

        """
        i = int(prompt)
        return Prediction(self._quality[i], self._output[i], self._learned)


def simulate(
    scenario: Scenario,
    decider: Decider | None = None,
    *,
    seed: int = 0,
    on_decision: OnDecision | None = None,
) -> Outcome:
    """Let core's `Router` decide the whole scenario.

    The snapshot's own algorithm decides unless a ``decider`` is given; admission is the
    snapshot's. ``seed`` is for the router's lots and for deciders that draw.

    Raises:
        ScenarioError: the scenario cannot be simulated.
        DeciderFailedError: the decider failed on a request.

    """
    simulation = Simulation(scenario)
    router = Router(
        scenario.snapshot, simulation.state, predictor=ReplayPredictor(scenario), seed=seed
    )
    if decider is not None:
        router.replace_decider(decider)
    for i, arrival in enumerate(scenario.arrival_s.tolist()):
        simulation.advance(arrival)
        decision = router.decide(core_request(scenario, i), now_s=arrival)
        if decision.fallback_reason is not None:
            raise DeciderFailedError(f"at request {i}: {decision.fallback_reason}")
        if on_decision is not None:
            on_decision(simulation, i, decision)
        if decision.chosen is None:
            simulation.reject(i)
        else:
            simulation.submit(i, simulation.state.row(decision.chosen.address))
    return simulation.finish()
