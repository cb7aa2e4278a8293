import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pointsman_core.cost import CostModel
from pointsman_core.resources import ExpertLimits, PerformanceProfile

COST = CostModel(
    overhead_s=0.002,
    compute_s_per_token=0.0005,
    weights_s=0.02,
    context_s_per_token=1e-6,
    kv_capacity_tokens=4096,
    max_sequences=8,
    max_batched_tokens=512,
)
counts = st.integers(min_value=0, max_value=10_000)


def test_data_sheet_numbers_become_times():
    profile = PerformanceProfile(
        peak_tflops=100,
        memory_bandwidth_gbps=1000,
        parameters_billions=10,
        bytes_per_parameter=2,
        kv_bytes_per_token=2**17,
        kv_cache_gib=1,
        compute_efficiency=0.5,
        bandwidth_efficiency=0.8,
        iteration_overhead_ms=3,
        max_batched_tokens=256,
    )
    cost = CostModel.from_profile(profile, ExpertLimits(concurrency=16))
    assert cost.overhead_s == pytest.approx(0.003)
    assert cost.compute_s_per_token == pytest.approx(2 * 10e9 / 50e12)
    assert cost.weights_s == pytest.approx(20e9 / 800e9)
    assert cost.context_s_per_token == pytest.approx(2**17 / 800e9)
    assert cost.kv_capacity_tokens == 8192
    assert cost.max_sequences == 16
    assert cost.max_batched_tokens == 256


def test_measured_times_count_instead():
    measured = {"overheadMs": 3, "perTokenUs": 200, "weightsMs": 20, "perContextTokenUs": 0.5}
    profile = PerformanceProfile.model_validate(
        {"measured": measured, "kvBytesPerToken": 2**17, "kvCacheGiB": 1, "maxBatchedTokens": 256}
    )
    cost = CostModel.from_profile(profile, ExpertLimits(concurrency=16))
    assert cost.overhead_s == pytest.approx(0.003)
    assert cost.compute_s_per_token == pytest.approx(0.0002)
    assert cost.weights_s == pytest.approx(0.020)
    assert cost.context_s_per_token == pytest.approx(5e-7)
    assert cost.kv_capacity_tokens == 8192
    assert (cost.max_sequences, cost.max_batched_tokens) == (16, 256)


def test_measured_times_must_take_time():
    measured = {"overheadMs": 0, "perTokenUs": 1, "weightsMs": 0, "perContextTokenUs": 0}
    with pytest.raises(ValidationError, match="overheadMs and weightsMs must not both be 0"):
        PerformanceProfile.model_validate({"measured": measured})


def test_small_batch_is_bound_by_memory():
    seconds = COST.iteration_seconds(prefill_tokens=0, decode_sequences=4, context_tokens=1000)
    assert seconds == pytest.approx(0.002 + 0.02 + 0.001)


def test_long_prefill_is_bound_by_arithmetic():
    seconds = COST.iteration_seconds(prefill_tokens=500, decode_sequences=12, context_tokens=600)
    assert seconds == pytest.approx(0.002 + 512 * 0.0005)


@given(prefill=counts, decode=counts, context=counts, more=counts)
def test_more_work_never_takes_less_time(prefill, decode, context, more):
    def seconds(prefill, decode, context):
        return COST.iteration_seconds(
            prefill_tokens=prefill, decode_sequences=decode, context_tokens=context
        )

    base = seconds(prefill, decode, context)
    assert seconds(prefill + more, decode, context) >= base
    assert seconds(prefill, decode + more, context) >= base
    assert seconds(prefill, decode, context + more) >= base
    assert base >= COST.overhead_s + COST.weights_s
