import dataclasses

import pytest

from pointsman_core.cost import CostModel
from pointsman_core.resources import (
    Backend,
    ExpertLimits,
    LLMExpertSpec,
    PerformanceProfile,
)
from pointsman_engine_sim.settings import EngineSettings, Faults

COST = CostModel.from_profile(PerformanceProfile(), ExpertLimits())


def test_expert_settles_model_speed_and_limits():
    spec = LLMExpertSpec(
        model="coder",
        aliases=["auto"],
        backend=Backend(addresses=["127.0.0.1:1"]),
        limits=ExpertLimits(context_tokens=4096, concurrency=4),
        expected_output_tokens=100,
    )
    settings = EngineSettings.from_spec(spec, port=8000, seed=3)
    assert settings.served_models == ("coder", "auto")
    assert settings.cost == CostModel.from_profile(spec.profile, spec.limits)
    assert settings.max_model_len == settings.context_tokens == 4096
    assert settings.expected_output_tokens == 100
    assert (settings.host, settings.port, settings.seed) == ("127.0.0.1", 8000, 3)


def test_context_that_the_cache_cannot_hold_is_refused():
    small = dataclasses.replace(COST, kv_capacity_tokens=4095)
    with pytest.raises(ValueError, match="4096 tokens does not fit into the KV cache of 4095"):
        EngineSettings(model="tiny", cost=small, context_tokens=4096)


def test_context_ends_with_the_last_whole_block():
    odd = dataclasses.replace(COST, kv_capacity_tokens=100)
    assert EngineSettings(model="tiny", cost=odd, context_tokens=100).max_model_len == 96


@pytest.mark.parametrize("tokens", [0, 1])
def test_context_holds_prompt_and_answer(tokens):
    with pytest.raises(ValueError, match="at least 2"):
        EngineSettings(model="tiny", cost=COST, context_tokens=tokens)


@pytest.mark.parametrize(
    "wrong", [{"fail_after_tokens": -1}, {"error_rate": 1.5}, {"error_rate": -0.1}]
)
def test_impossible_faults_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Faults(**wrong)
