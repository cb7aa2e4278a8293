"""A fitted cost model as the fields of an LLMExpert."""

from typing import Any

import yaml

from pointsman_core.cost import CostModel
from pointsman_core.resources import ExpertLimits, MeasuredTimes, PerformanceProfile
from pointsman_learning.calibration.design import EngineLimits
from pointsman_learning.calibration.fit import Times

DIGITS = 5
"""Significant ones; no measurement here is better."""


def profile_fields(times: Times, limits: EngineLimits) -> dict[str, Any]:
    """``limits`` and ``profile`` of an LLMExpert, as YAML spells them."""
    default = PerformanceProfile.model_fields["kv_bytes_per_token"].default
    return {
        "limits": {"contextTokens": limits.context_tokens, "concurrency": limits.concurrency},
        "profile": {
            "measured": {
                "overheadMs": _rounded(1e3 * times.overhead_s),
                "perTokenUs": _rounded(1e6 * times.compute_s_per_token),
                "weightsMs": _rounded(1e3 * times.weights_s),
                "perContextTokenUs": _rounded(1e6 * times.context_s_per_token),
            },
            "kvBytesPerToken": default,
            # Only the quotient matters. Half a token more: never one less by rounding.
            "kvCacheGiB": round((limits.kv_capacity_tokens + 0.5) * default / 2**30, 6),
            "maxBatchedTokens": limits.max_batched_tokens,
        },
    }


def profile_yaml(times: Times, limits: EngineLimits) -> str:
    """The same as YAML, to be pasted into the ``spec`` of an LLMExpert."""
    return yaml.safe_dump(profile_fields(times, limits), sort_keys=False)


def cost_model(fields: dict[str, Any]) -> CostModel:
    """The cost model that these fields give."""
    return CostModel.from_profile(
        PerformanceProfile.model_validate(fields["profile"]),
        ExpertLimits.model_validate(fields["limits"]),
    )


def times_of(measured: MeasuredTimes) -> Times:
    """The fitted times again."""
    return Times(
        overhead_s=measured.overhead_ms / 1e3,
        compute_s_per_token=measured.per_token_us / 1e6,
        weights_s=measured.weights_ms / 1e3,
        context_s_per_token=measured.per_context_token_us / 1e6,
    )


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
