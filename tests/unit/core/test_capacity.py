import pytest

from pointsman_core.capacity import capacity as pool_capacity
from pointsman_core.capacity import endpoint_capacity
from pointsman_core.cost import CostModel


def cost(**changes) -> CostModel:
    """10 ms per iteration whatever it holds, chunks of 100 tokens, 4 sequences."""
    values = {
        "overhead_s": 0.01,
        "compute_s_per_token": 0.0,
        "weights_s": 0.0,
        "context_s_per_token": 0.0,
        "kv_capacity_tokens": 10_000,
        "max_sequences": 4,
        "max_batched_tokens": 100,
    }
    return CostModel(**(values | changes))


def capacity(model: CostModel, *, limit_s: float) -> float:
    return endpoint_capacity(model, input_tokens=96.0, output_tokens=50.0, limit_s=limit_s)


def test_full_batch_when_the_limit_allows_it():
    # 4 sequences of 50 iterations at 10 ms; their 4 prefill chunks ride on 4 of these.
    assert capacity(cost(), limit_s=1.0) == pytest.approx(4 / 0.5)


def test_smaller_batch_when_the_limit_is_tight():
    # An iteration takes 10 ms more for each 121 tokens of context, one sequence's mean.
    slow = cost(overhead_s=0.0, context_s_per_token=0.01 / 121)
    alone = capacity(slow, limit_s=0.0103)
    assert alone == pytest.approx(1 / 0.5)
    # Two at a time take 20 ms per token each: no more per second, and too late.
    assert capacity(slow, limit_s=0.0250) == pytest.approx(alone)


def test_kv_cache_bounds_the_batch():
    # 121 tokens per sequence on average: two fit.
    assert capacity(cost(kv_capacity_tokens=300), limit_s=1.0) == pytest.approx(2 / 0.5)


def test_too_slow_even_for_one():
    assert capacity(cost(), limit_s=0.005) == 0.0


def test_endpoints_add_up_each_with_its_own_answer_length():
    total = pool_capacity([(cost(), 50.0), (cost(), 100.0)], input_tokens=96.0)
    alone = [endpoint_capacity(cost(), input_tokens=96.0, output_tokens=n) for n in (50.0, 100.0)]
    assert total == pytest.approx(sum(alone))
    assert pool_capacity([], input_tokens=96.0) == 0.0
