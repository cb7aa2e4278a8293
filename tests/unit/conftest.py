from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from pointsman_core.deciders import Scores
from pointsman_core.observation import Request
from pointsman_core.resources import (
    Backend,
    ExpertLimits,
    LLMExpert,
    LLMExpertSpec,
    ObjectMeta,
    PerformanceProfile,
    RoutingPolicy,
    RoutingPolicySpec,
)
from pointsman_core.router import Router
from pointsman_core.snapshot import Snapshot, compile_snapshot
from pointsman_core.state import Admitted, LiveState

# Machines that run tests are shared: how long an example takes says nothing.
settings.register_profile("pointsman", deadline=None)
settings.load_profile("pointsman")

ROUND_PROFILE = {
    "parameters_billions": 1.048576,
    "bytes_per_parameter": 2.0,
    "peak_tflops": 2.097152,
    "compute_efficiency": 1.0,
    "memory_bandwidth_gbps": 1048.576,
    "bandwidth_efficiency": 1.0,
    "kv_bytes_per_token": 2**20,
    "kv_cache_gib": 1.0,
    "iteration_overhead_ms": 1.0,
    "max_batched_tokens": 512,
}
"""An iteration takes 1 ms + max(1 ms per token, 2 ms + 1 us per token of context).

The KV cache holds 1024 tokens.
"""


class Build:
    """Small builders; whatever is not given has a round number."""

    @staticmethod
    def expert(
        name: str,
        *addresses: str,
        profile: dict[str, Any] | None = None,
        limits: dict[str, Any] | None = None,
        **spec: Any,
    ) -> LLMExpert:
        fields = {"expected_output_tokens": 10} | spec
        return LLMExpert(
            metadata=ObjectMeta(name=name),
            spec=LLMExpertSpec(
                model=f"{name}-model",
                backend=Backend(addresses=list(addresses)),
                profile=PerformanceProfile(**(ROUND_PROFILE | (profile or {}))),
                limits=ExpertLimits(
                    **({"context_tokens": 1024, "concurrency": 4} | (limits or {}))
                ),
                **fields,
            ),
        )

    @staticmethod
    def snapshot(*experts: LLMExpert, name: str = "auto", **spec: Any) -> Snapshot:
        policy = RoutingPolicy(
            metadata=ObjectMeta(name=name), spec=RoutingPolicySpec(**({"models": ["auto"]} | spec))
        )
        where = {e.metadata.name: tuple(e.spec.backend.addresses or ()) for e in experts}
        return compile_snapshot(policy, experts, where)

    @classmethod
    def router(cls, *experts: LLMExpert, seed: int = 0, **spec: Any) -> tuple[Router, LiveState]:
        snapshot = cls.snapshot(*experts, **spec)
        state = LiveState()
        state.set_endpoints(c.address for c in snapshot.candidates)
        return Router(snapshot, state, seed=seed), state

    @staticmethod
    def request(**fields: Any) -> Request:
        defaults = {"prompt": "hello", "prompt_tokens": 100, "arrival_s": 0.0, "limit_s": 0.06}
        return Request(**(defaults | fields))

    @staticmethod
    def admitted(**fields: Any) -> Admitted:
        defaults = {
            "arrival_s": 0.0,
            "prompt_tokens": 50.0,
            "expected_output_tokens": 12.0,
            "limit_s": 0.06,
            "quality": 0.5,
        }
        return Admitted(**(defaults | fields))


@pytest.fixture(scope="session")
def build() -> type[Build]:
    return Build


class FixedScores:
    """A decider that always says the same, or raises it."""

    def __init__(self, said) -> None:
        self.said = said

    def score(self, seen):  # noqa: ARG002
        if isinstance(self.said, Exception):
            raise self.said
        return self.said if isinstance(self.said, Scores) else Scores(np.asarray(self.said))


@pytest.fixture(scope="session")
def fixed_scores() -> type[FixedScores]:
    return FixedScores
