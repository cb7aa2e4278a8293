"""The models alone: what they accept, and that each rule refuses what it is there for."""

import pytest
from pydantic import BaseModel, ValidationError

from pointsman_core.resources import (
    SERVED_NAME_PATTERN,
    Algorithm,
    Backend,
    Condition,
    EndpointCount,
    LabelSelector,
    LLMExpert,
    LLMExpertSpec,
    QoS,
    RoutingPolicySpec,
)

BACKEND = {"addresses": ["127.0.0.1:8000"]}


def messages(model: type[BaseModel], value: object) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(value)
    return [error["msg"] for error in caught.value.errors()]


def test_a_minimal_expert_gets_all_defaults():
    expert = LLMExpert.model_validate(
        {"metadata": {"name": "qwen2.5-7b"}, "spec": {"model": "qwen", "backend": BACKEND}}
    )
    assert expert.metadata.namespace == "default"
    assert expert.spec.engine.metrics.path == "/metrics"
    assert expert.status is None


@pytest.mark.parametrize("name", ["/models/qwen.gguf", "Qwen/Qwen2.5-7B-Instruct", "qwen2.5:7b"])
def test_an_expert_s_model_may_be_a_path(name):
    """As vLLM calls a model that it has from a folder, without --served-model-name."""
    spec = {"model": name, "aliases": ["/other"], "backend": BACKEND}
    assert LLMExpertSpec.model_validate(spec).model == name


@pytest.mark.parametrize("name", ["/", "//models/qwen", "models qwen", ""])
def test_what_no_engine_calls_a_model(name):
    spec = {"model": name, "backend": BACKEND}
    assert messages(LLMExpertSpec, spec) == [f"String should match pattern '{SERVED_NAME_PATTERN}'"]


def test_a_policy_s_model_is_no_path():
    assert messages(RoutingPolicySpec, {"models": ["/models/qwen"]}) != []


def test_a_policy_needs_no_more_than_a_model_name():
    spec = RoutingPolicySpec(models=["auto"])
    assert spec.algorithm is Algorithm.LATENCY_QUALITY_GREEDY
    assert spec.fallback is Algorithm.LEAST_LOAD


def test_algorithm_and_fallback_may_be_equal():
    spec = RoutingPolicySpec(models=["auto"], algorithm=Algorithm.LEAST_LOAD)
    assert spec.algorithm == spec.fallback


MODEL = {"file": "han.onnx", "sha256": "a" * 64}


def test_a_model_is_for_han_drl_only():
    spec = RoutingPolicySpec(models=["auto"], algorithm="HanDrl", model=MODEL)
    assert spec.model.file == "han.onnx"
    wrong = {"models": ["auto"], "algorithm": "LeastLoad", "model": MODEL}
    assert messages(RoutingPolicySpec, wrong) == ["model is for algorithm: HanDrl only"]


def test_the_fallback_needs_no_model():
    assert messages(RoutingPolicySpec, {"models": ["auto"], "fallback": "HanDrl"}) == [
        "fallback must not be HanDrl: it has to work when no model does"
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"file": "../han.onnx"},
        {"file": "models/han.onnx"},
        {"file": ""},
        {"file": ".hidden"},
        {"sha256": "a" * 63},
        {"sha256": "A" * 64},
    ],
)
def test_a_model_is_a_file_name_and_a_checksum(wrong):
    value = {"models": ["auto"], "algorithm": "HanDrl", "model": MODEL | wrong}
    assert len(messages(RoutingPolicySpec, value)) == 1


@pytest.mark.parametrize(
    "backend",
    [{}, {"addresses": ["127.0.0.1:1"], "service": {"name": "a", "port": 1}}],
    ids=["none", "two"],
)
def test_exactly_one_backend(backend):
    assert messages(Backend, backend) == [
        "write exactly one of service, podSelector, inferencePool and addresses"
    ]


def test_backend_names_what_is_given_as_yaml_spells_it():
    backend = Backend.model_validate({"podSelector": {"matchLabels": {"a": "b"}, "port": 80}})
    assert backend.given == ("podSelector",)


@pytest.mark.parametrize(
    "address", ["0.0.0.1:1", "255.255.255.255:65535", "[::1]:80", "[fe80::1:2]:8000"]
)
def test_addresses_accepted(address):
    assert Backend(addresses=[address]).addresses == [address]


@pytest.mark.parametrize(
    "address",
    [
        "localhost:80",
        "127.0.0.1",
        "127.0.0.1:0",
        "127.0.0.1:65536",
        "127.0.0.1:080",
        "256.0.0.1:80",
        "01.2.3.4:80",
        "127.0.0.1:80\n",
        "\N{ARABIC-INDIC DIGIT ONE}.0.0.1:80",
        "::1:80",
        "[]:80",
        "[::::]:80",
        "[::ffff:1.2.3.4]:80",
        "0.0.0.0:80",
        "[::]:80",
        "[0:0::0.0.0.0]:80",
    ],
)
def test_addresses_refused(address):
    messages(Backend, {"addresses": [address]})


def test_lists_refuse_repeats():
    repeated = {"model": "a", "aliases": ["b", "b"], "backend": BACKEND}
    assert messages(LLMExpertSpec, repeated) == ["must not repeat b"]
    domains = [{"name": "code", "keywords": ["x"]}, {"name": "code", "keywords": ["y"]}]
    assert messages(RoutingPolicySpec, {"models": ["a"], "domains": domains}) == [
        "must not repeat code"
    ]


def test_aliases_must_not_repeat_the_model():
    (message,) = messages(LLMExpertSpec, {"model": "a", "aliases": ["a"], "backend": BACKEND})
    assert message.startswith("aliases must not repeat model")


def test_one_full_context_must_fit_into_the_kv_cache():
    profile = {"kvCacheGiB": 1, "kvBytesPerToken": 2**20}
    spec = {"model": "a", "backend": BACKEND, "profile": profile}
    LLMExpertSpec.model_validate(spec | {"limits": {"contextTokens": 1024}})
    (message,) = messages(LLMExpertSpec, spec | {"limits": {"contextTokens": 1025}})
    assert message.startswith("the KV cache cannot hold")


def test_first_token_limit_is_not_below_the_limit_per_token():
    QoS(latency_per_token_ms=50, time_to_first_token_ms=50)
    (message,) = messages(QoS, {"latencyPerTokenMs": 50, "timeToFirstTokenMs": 0.5})
    assert "milliseconds" in message


@pytest.mark.parametrize("key", ["k", "K_1.a-b", "k" * 63, "example.com/k", "d" * 253 + "/k"])
def test_label_keys(key):
    LabelSelector(match_labels={key: "v"})


@pytest.mark.parametrize("key", ["", "a b", "k-", "k" * 64, "Example.com/k", "/k", "a/b/c", "k\n"])
def test_label_keys_that_no_label_can_have(key):
    (message,) = messages(LabelSelector, {"matchLabels": {key: "v"}})
    assert message.startswith("a label key must be up to 63 letters")


def test_label_keys_have_a_bound():
    messages(LabelSelector, {"matchLabels": {"d" * 254 + "/" + "k" * 63: "v"}})


def test_status_counts_no_more_ready_endpoints_than_there_are():
    assert messages(EndpointCount, {"ready": 2, "total": 1}) == ["ready must not exceed total"]


def test_conditions_know_their_time_zone():
    condition = {"type": "Ready", "status": "True", "reason": "Ok", "message": ""}
    Condition.model_validate(condition | {"lastTransitionTime": "2026-01-01T00:00:00Z"})
    messages(Condition, condition | {"lastTransitionTime": "2026-01-01T00:00:00"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_are_finite(value):
    messages(QoS, {"latencyPerTokenMs": value})


def test_unknown_fields_are_refused():
    messages(QoS, {"latencyPerTokenMS": 1})
