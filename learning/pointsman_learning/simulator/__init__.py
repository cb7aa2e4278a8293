"""Endpoints with continuous batching, in simulated time.

`RoutingEnv` is in `pointsman_learning.simulator.environment`: it alone needs gymnasium.
"""

from pointsman_learning.simulator.arrays import UNDECIDED
from pointsman_learning.simulator.checks import ScenarioError, check
from pointsman_learning.simulator.run import (
    DeciderFailedError,
    ReplayPredictor,
    core_request,
    simulate,
)
from pointsman_learning.simulator.scenario import (
    REJECTED,
    Availability,
    Change,
    Gauges,
    Outcome,
    Scenario,
)
from pointsman_learning.simulator.simulation import SimulatedState, Simulation

__all__ = [
    "REJECTED",
    "UNDECIDED",
    "Availability",
    "Change",
    "DeciderFailedError",
    "Gauges",
    "Outcome",
    "ReplayPredictor",
    "Scenario",
    "ScenarioError",
    "SimulatedState",
    "Simulation",
    "check",
    "core_request",
    "simulate",
]
