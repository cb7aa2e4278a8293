"""How many requests per second a site can serve within its limit, by the cost model."""

from collections.abc import Iterable

from pointsman_core.capacity import capacity
from pointsman_core.cost import CostModel
from pointsman_core.resources import LLMExpert


def site_capacity(
    experts: Iterable[LLMExpert], *, input_tokens: float, max_output_tokens: int, limit_ms: float
) -> float:
    """Requests per second of all endpoints together; prompts are ``input_tokens`` long."""
    endpoints = (
        (
            CostModel.from_profile(expert.spec.profile, expert.spec.limits),
            float(min(expert.spec.expected_output_tokens, max_output_tokens)),
        )
        for expert in experts
        for _ in expert.spec.backend.addresses or ()
    )
    return capacity(endpoints, input_tokens=input_tokens, limit_s=limit_ms / 1e3)
