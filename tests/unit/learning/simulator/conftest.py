from typing import Any

import numpy as np
import pytest

from pointsman_learning.simulator import Scenario, Simulation


class Lab:
    """Small scenarios on endpoints of `ROUND_PROFILE`, and how to run them."""

    def __init__(self, build) -> None:
        self.build = build

    def snapshot(self, endpoints: int = 1, *, profile=None, limits=None, **spec: Any):
        experts = [
            self.build.expert(f"e{i}", f"10.0.0.{i + 1}:8000", profile=profile, limits=limits)
            for i in range(endpoints)
        ]
        return self.build.snapshot(*experts, **spec)

    def scenario(
        self, *requests: tuple[float, int, int], snapshot=None, endpoints=1, **fields: Any
    ) -> Scenario:
        """Requests are (arrival, prompt tokens, output tokens)."""
        snapshot = snapshot or self.snapshot(endpoints)
        n, e = len(requests), len(snapshot.candidates)
        output = np.array([[r[2]] * e for r in requests], np.int64).reshape(n, e)
        defaults = {
            "snapshot": snapshot,
            "arrival_s": np.array([r[0] for r in requests], np.float64),
            "prompt_tokens": np.array([r[1] for r in requests], np.int64),
            "limit_s": np.full(n, 0.05),
            "score": np.linspace(0.1, 0.9, n * e).reshape(n, e),
            "output_tokens": output,
            "predicted_quality": np.linspace(0.2, 0.8, n * e).reshape(n, e),
            "predicted_output_tokens": output * 2.0,
            "detection_s": 0.0,
        }
        return Scenario(**(defaults | fields))

    @staticmethod
    def play(simulation: Simulation, endpoints=None) -> Simulation:
        """Submit all requests as they arrive: to the given endpoints, else in turn."""
        count = simulation.scenario.endpoints
        for i, arrival in enumerate(simulation.scenario.arrival_s.tolist()):
            simulation.advance(arrival)
            simulation.submit(i, i % count if endpoints is None else endpoints[i])
        return simulation


@pytest.fixture(scope="session")
def lab(build) -> Lab:
    return Lab(build)
