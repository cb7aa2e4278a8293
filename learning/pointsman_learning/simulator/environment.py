"""The simulator as a gymnasium environment: one step per arriving request."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, cast

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from pointsman_core.observation import CostColumns, Observation, RoutingTable, observe
from pointsman_core.resources import Admission
from pointsman_core.state import IntArray
from pointsman_learning.simulator.run import ReplayPredictor, core_request
from pointsman_learning.simulator.scenario import REJECTED, Outcome, Scenario, qos_of
from pointsman_learning.simulator.simulation import Simulation

REQUEST_FEATURES = ("prompt_tokens", "waited_s", "limit_s", "first_token_limit_s")
COST_FEATURES = tuple(f.name for f in fields(CostColumns))
ENDPOINT_FEATURES = (
    "eligible",
    "quality",
    "output_tokens",
    "foreign",
    "kv_usage",
    *COST_FEATURES,
)
RESIDENT_FEATURES = (
    "elapsed_s",
    "prompt_tokens",
    "expected_output",
    "output_tokens",
    "limit_s",
    "quality",
)
UNKNOWN_USAGE = -1.0
"""``kv_usage`` where it is not known: the space has no NaN."""
BOUND = 1e9
"""Stands for no limit: the space has no infinity either."""

Padded = dict[str, NDArray[Any]]
Reward = Callable[[Simulation, IntArray, int], float]
"""From the simulation, the requests finished since the last step, and the one just decided."""


def realised_qos(simulation: Simulation, finished: IntArray, decided: int) -> float:  # noqa: ARG001
    """The default reward: QoS of the requests that finished since the last step, summed.

    Summed over an episode it is the scenario's total QoS.
    """
    qos = qos_of(
        simulation.scenario,
        finished,
        endpoint=simulation.endpoint[finished],
        first_token_s=simulation.first_token_s[finished],
        finish_s=simulation.finish_s[finished],
    )
    return float(qos.sum())


class RoutingEnv(gymnasium.Env[Padded, np.int64]):
    """Routing as an environment; an episode is a scenario.

    Observations are core's `Observation`, which `observed` has as it is, padded to fixed
    shapes:

    - ``request`` (4,): `REQUEST_FEATURES`
    - ``endpoints`` (endpoints, 12): `ENDPOINT_FEATURES`, rows of zeros behind the last one
    - ``residents`` (in_flight, 6): `RESIDENT_FEATURES`, likewise; of more requests than
      that the rest is left out, ``observed`` has all
    - ``resident_endpoint`` (in_flight,): -1 behind the last one
    - ``action_mask`` (actions,): 1 where the action is valid

    Actions are endpoints, and behind them rejection if ``may_reject``. An action is invalid
    where there is no such endpoint or core calls it ineligible. It turns the request away if
    ``may_reject``; else, as best effort rejects nothing, the next eligible endpoint takes it
    (by number, the first one after the last). Where no endpoint is eligible, and the mask all
    zeros, every action turns the request away, as core's router does.

    ``info["endpoint"]`` of a step is where the request went, or `REJECTED`.
    """

    metadata = {"render_modes": []}  # noqa: RUF012  (as gymnasium has it)

    def __init__(
        self,
        scenarios: Callable[[np.random.Generator], Scenario],
        *,
        endpoints: int,
        may_reject: bool,
        in_flight: int = 256,
        reward: Reward = realised_qos,
    ) -> None:
        """Make episodes of what ``scenarios`` draws, of at most so many endpoints."""
        self._scenarios = scenarios
        self._reward = reward
        self._may_reject = may_reject
        actions = endpoints + may_reject
        self.action_space = spaces.Discrete(actions)
        parts: dict[str, spaces.Space[Any]] = {
            "request": _numbers(len(REQUEST_FEATURES)),
            "endpoints": _numbers(endpoints, len(ENDPOINT_FEATURES), low=UNKNOWN_USAGE),
            "residents": _numbers(in_flight, len(RESIDENT_FEATURES)),
            "resident_endpoint": spaces.Box(-1, endpoints - 1, (in_flight,), np.int64),
            "action_mask": spaces.MultiBinary(actions),
        }
        self.observation_space = cast("spaces.Space[Padded]", spaces.Dict(parts))
        self._endpoints, self._in_flight = endpoints, in_flight
        self.simulation: Simulation
        """The episode's simulation, from `reset` on."""
        self.observed: Observation
        """What the padded observation is made of."""
        self.outcome: Outcome | None = None
        """What became of the requests, once the episode is over."""
        self._table: RoutingTable
        self._request = 0
        self._counted = 0  # finished requests that were rewarded

    @classmethod
    def of(cls, scenario: Scenario, **options: Any) -> "RoutingEnv":  # noqa: ANN401
        """Every episode the same scenario; rejection as its policy's admission says."""
        return cls(
            lambda _: scenario,
            endpoints=scenario.endpoints,
            may_reject=scenario.snapshot.admission is Admission.REJECT,
            **options,
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Padded, dict[str, Any]]:
        """Begin a new scenario at its first request.

        Raises:
            ScenarioError: it cannot be simulated.
            ValueError: it has more endpoints than this environment has places.

        """
        super().reset(seed=seed, options=options)
        scenario = self._scenarios(self.np_random)
        if scenario.endpoints > self._endpoints:
            raise ValueError(
                f"the scenario has {scenario.endpoints} endpoints, there are places for"
                f" {self._endpoints}"
            )
        self.simulation = Simulation(scenario)
        self._table = RoutingTable(
            scenario.snapshot, self.simulation.state, ReplayPredictor(scenario)
        )
        self.outcome = None
        self._request = self._counted = 0
        return self._look(), {"request": 0}

    def step(self, action: np.int64) -> tuple[Padded, float, bool, bool, dict[str, Any]]:
        """Decide the request at hand and go on to the next.

        Raises:
            RuntimeError: the episode is over.

        """
        if self.outcome is not None:
            raise RuntimeError("the episode is over: call reset()")
        decided, simulation = self._request, self.simulation
        endpoint = self._endpoint_of(int(action))
        if endpoint == REJECTED:
            simulation.reject(decided)
        else:
            simulation.submit(decided, endpoint)
        self._request += 1
        over = self._request == len(simulation.scenario)
        if over:
            self.outcome = simulation.finish()
            seen = self._nothing()
        else:
            seen = self._look()
        finished = simulation.finished[self._counted :]
        self._counted += len(finished)
        reward = self._reward(simulation, finished, decided)
        return seen, reward, over, False, {"request": self._request, "endpoint": endpoint}

    def _endpoint_of(self, action: int) -> int:
        """Where an action sends the request at hand."""
        eligible = np.flatnonzero(self.observed.eligible)
        if action in eligible:
            return action
        if self._may_reject or not len(eligible):
            return REJECTED
        return int(eligible[np.searchsorted(eligible, action) % len(eligible)])

    def _look(self) -> Padded:
        scenario, simulation = self.simulation.scenario, self.simulation
        simulation.advance(float(scenario.arrival_s[self._request]))
        request = core_request(scenario, self._request)
        self.observed = observe(self._table, simulation.state, request, now_s=simulation.now_s)
        return self._pad(self.observed)

    def _nothing(self) -> Padded:
        return {
            "request": np.zeros(len(REQUEST_FEATURES)),
            "endpoints": np.zeros((self._endpoints, len(ENDPOINT_FEATURES))),
            "residents": np.zeros((self._in_flight, len(RESIDENT_FEATURES))),
            "resident_endpoint": np.full(self._in_flight, -1, np.int64),
            "action_mask": np.zeros(self._endpoints + self._may_reject, np.int8),
        }

    def _pad(self, seen: Observation) -> Padded:
        padded = self._nothing()
        padded["request"][:] = (
            seen.prompt_tokens,
            seen.waited_s,
            min(seen.limit_s, BOUND),
            min(seen.first_token_limit_s, BOUND),
        )
        rows = padded["endpoints"][: len(seen.quality)].T
        known = np.where(np.isnan(seen.kv_usage), UNKNOWN_USAGE, seen.kv_usage)
        columns = (seen.eligible, seen.quality, seen.output_tokens, seen.foreign, known)
        for index, column in enumerate(columns):
            rows[index] = column
        for index, name in enumerate(COST_FEATURES, start=len(columns)):
            rows[index] = getattr(seen.cost, name)
        self._pad_residents(padded, seen)
        padded["action_mask"][: len(seen.quality)] = seen.eligible
        if self._may_reject:
            padded["action_mask"][-1] = 1
        return padded

    def _pad_residents(self, padded: Padded, seen: Observation) -> None:
        count = min(len(seen.resident_candidate), self._in_flight)
        padded["resident_endpoint"][:count] = seen.resident_candidate[:count]
        rows = padded["residents"][:count].T
        columns = (
            seen.resident_elapsed_s,
            seen.resident_prompt_tokens,
            seen.resident_expected_output,
            seen.resident_output_tokens,
            np.minimum(seen.resident_limit_s, BOUND),
            seen.resident_quality,
        )
        for index, column in enumerate(columns):
            rows[index] = column[:count]


def _numbers(*shape: int, low: float = 0.0) -> spaces.Box:
    return spaces.Box(low, BOUND, shape, np.float64)
