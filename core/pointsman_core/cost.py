"""Roofline cost model of one engine iteration, shared by deciders and engine simulator.

An iteration runs some prefill tokens and one token of each decoding sequence. It takes
the longer of its arithmetic (2 FLOP per parameter and token) and its memory traffic (all
weights once, the KV cache of all sequences once), plus a fixed overhead. This is the
roofline model (Williams et al., CACM 2009) with the usual dense-decoder counts (Kaplan et
al., arXiv 2001.08361); attention's own FLOPs are left out. The efficiencies are ours.
"""

from dataclasses import dataclass

from pointsman_core.resources import ExpertLimits, MeasuredTimes, PerformanceProfile


@dataclass(frozen=True, slots=True)
class CostModel:
    """What one endpoint's iterations cost; all times in seconds."""

    overhead_s: float
    """Fixed time of an iteration."""
    compute_s_per_token: float
    """Arithmetic of one token, prefill or decode."""
    weights_s: float
    """Reading all weights once."""
    context_s_per_token: float
    """Reading the KV cache of one token of context."""
    kv_capacity_tokens: int
    """Tokens of context that fit into the KV cache."""
    max_sequences: int
    """Sequences in one batch."""
    max_batched_tokens: int
    """Token budget of one iteration: prefill chunk and decode tokens together."""

    @classmethod
    def from_profile(cls, profile: PerformanceProfile, limits: ExpertLimits) -> "CostModel":
        """Take measured times, or turn data-sheet numbers into times."""
        if profile.measured is not None:
            return cls._from_measured(profile.measured, profile, limits)
        parameters = profile.parameters_billions * 1e9
        bandwidth = profile.memory_bandwidth_gbps * 1e9 * profile.bandwidth_efficiency
        flops = profile.peak_tflops * 1e12 * profile.compute_efficiency
        return cls(
            overhead_s=profile.iteration_overhead_ms / 1e3,
            compute_s_per_token=2.0 * parameters / flops,
            weights_s=parameters * profile.bytes_per_parameter / bandwidth,
            context_s_per_token=profile.kv_bytes_per_token / bandwidth,
            **_capacities(profile, limits),
        )

    @classmethod
    def _from_measured(
        cls, times: MeasuredTimes, profile: PerformanceProfile, limits: ExpertLimits
    ) -> "CostModel":
        return cls(
            overhead_s=times.overhead_ms / 1e3,
            compute_s_per_token=times.per_token_us / 1e6,
            weights_s=times.weights_ms / 1e3,
            context_s_per_token=times.per_context_token_us / 1e6,
            **_capacities(profile, limits),
        )

    def iteration_seconds(
        self, *, prefill_tokens: int, decode_sequences: int, context_tokens: int
    ) -> float:
        """Time of one iteration.

        ``context_tokens`` counts the tokens in the KV cache of all its sequences.
        """
        tokens = prefill_tokens + decode_sequences
        compute = self.compute_s_per_token * tokens
        memory = self.weights_s + self.context_s_per_token * context_tokens
        return self.overhead_s + max(compute, memory)


def _capacities(profile: PerformanceProfile, limits: ExpertLimits) -> dict[str, int]:
    return {
        "kv_capacity_tokens": int(profile.kv_cache_gib * 2**30 / profile.kv_bytes_per_token),
        "max_sequences": limits.concurrency,
        "max_batched_tokens": profile.max_batched_tokens,
    }
