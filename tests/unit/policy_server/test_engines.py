"""Engines' Prometheus pages, in the engines' own formats, become loads."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from pointsman_core.resources import EngineType
from pointsman_policy.engines import (
    ADAPTERS,
    LLAMACPP,
    SGLANG,
    VLLM,
    Adapter,
    EngineLoad,
    MetricsError,
    adapter_for,
)
from pointsman_policy.engines.exposition import read_samples

DATA = Path(__file__).parent / "data"
VLLM_MINIMUM = "vllm:num_requests_running 1\nvllm:num_requests_waiting 2\n"


def page(name: str) -> str:
    return (DATA / f"{name}.prom").read_text()


@pytest.mark.parametrize(
    ("adapter", "name", "load"),
    [
        pytest.param(
            VLLM,
            "vllm",
            EngineLoad(7, 3, 0.4152490886998785, 128304, 91207),
            id="vllm",
        ),
        pytest.param(
            VLLM,
            "vllm_data_parallel",
            EngineLoad(7, 4, 0.375, 1500, 100),
            id="vllm: ranks add up, the caches' use is their mean",
        ),
        pytest.param(
            VLLM, "vllm_v0", EngineLoad(2, 1, 0.125, 4096, 512), id="vllm: the old name of KV use"
        ),
        pytest.param(
            SGLANG,
            "sglang",
            EngineLoad(24, 3, 0.73, 55000, 21000),
            id="sglang: streamed and other tokens add up",
        ),
        pytest.param(
            SGLANG,
            "sglang_ranks",
            EngineLoad(16, 3, 0.4, 55000, 21000),
            id="sglang: data-parallel ranks add up, tensor-parallel ones and priorities do not",
        ),
        pytest.param(
            LLAMACPP, "llamacpp", EngineLoad(4, 2, None, 6886, 3469), id="llama.cpp tells no KV use"
        ),
        pytest.param(
            LLAMACPP,
            "llamacpp_2024",
            EngineLoad(4, 2, 0.0625, 6886, 3469),
            id="llama.cpp: older builds tell the KV use",
        ),
    ],
)
def test_real_pages(adapter: Adapter, name: str, load: EngineLoad):
    assert adapter.parse(page(name)) == load


def test_the_new_name_of_kv_use_is_preferred():
    both = "vllm:gpu_cache_usage_perc 0.9\nvllm:kv_cache_usage_perc 0.1\n"
    assert VLLM.parse(VLLM_MINIMUM + both).kv_usage == 0.1


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=lambda a: a.engine.value)
@pytest.mark.parametrize("text", ["", "<html>no metrics here</html>", "\x00\x01\n{}{}"])
def test_a_page_of_something_else(adapter: Adapter, text: str):
    with pytest.raises(MetricsError, match=f"not a page of {adapter.engine.value}"):
        adapter.parse(text)


def test_a_page_of_another_engine():
    with pytest.raises(MetricsError, match="sglang:num_running_reqs is not on the page"):
        SGLANG.parse(page("vllm"))


@pytest.mark.parametrize("value", ["NaN", "-1", "+Inf", "-Inf", "1e300"])
def test_a_value_that_is_no_count(value: str):
    with pytest.raises(MetricsError, match=r"num_requests_waiting is .*: expected a count"):
        VLLM.parse(f"vllm:num_requests_running 1\nvllm:num_requests_waiting {value}\n")


@pytest.mark.parametrize("order", [("NaN", "1"), ("1", "NaN")])
def test_one_unreadable_rank_makes_the_sum_unreadable(order: tuple[str, str]):
    lines = [f'sglang:num_running_reqs{{tp_rank="{i}"}} {v}\n' for i, v in enumerate(order)]
    with pytest.raises(MetricsError):
        SGLANG.parse("".join(lines) + "sglang:num_queue_reqs 0\n")


@pytest.mark.parametrize(
    "line",
    [
        "vllm:num_requests_running{",
        'vllm:num_requests_running{a="b} 1',
        "vllm:num_requests_running x",
    ],
)
def test_a_malformed_line(line: str):
    with pytest.raises(MetricsError, match="malformed sample of vllm:num_requests_running"):
        VLLM.parse(line + "\nvllm:num_requests_waiting 0\n")


@pytest.mark.parametrize(("value", "usage"), [("NaN", None), ("1.02", 1.0), ("-0.0", 0.0)])
def test_odd_kv_use_does_not_spoil_the_page(value: str, usage: float | None):
    assert VLLM.parse(VLLM_MINIMUM + f"vllm:kv_cache_usage_perc {value}\n").kv_usage == usage


def test_optional_metrics_may_be_absent():
    assert VLLM.parse(VLLM_MINIMUM) == EngineLoad(running=1, waiting=2)


def test_malformed_lines_of_other_metrics_are_not_looked_at():
    assert VLLM.parse(VLLM_MINIMUM + "other{{{ broken\n").running == 1


def test_labels_with_braces_quotes_and_windows_line_ends():
    labels = r'{engine="0",model_name="a}b\"c, {d"}'
    text = f"vllm:num_requests_running{labels} 3.0\r\nvllm:num_requests_waiting{labels} 4\r\n"
    assert VLLM.parse(text) == EngineLoad(running=3, waiting=4)


def test_a_name_that_starts_like_another_is_not_taken_for_it():
    text = VLLM_MINIMUM + 'vllm:num_requests_waiting_by_reason{reason="x"} 50\n'
    assert VLLM.parse(text).waiting == 2


@pytest.mark.parametrize("name", sorted(path.stem for path in DATA.glob("*.prom")))
def test_the_line_filter_agrees_with_the_whole_parser(name: str):
    """Filtering first and parsing all give the same samples for every name that is read."""
    text = page(name)
    names = {name for adapter in ADAPTERS.values() for name in adapter.names}
    everything: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in (sample for sample in family.samples if sample.name in names):
            everything.setdefault(sample.name, []).append((sample.labels, sample.value))
    filtered = {
        key: [(sample.labels, sample.value) for sample in samples]
        for key, samples in read_samples(text, names).items()
    }
    assert filtered == everything
    assert len(filtered) >= 4


@given(st.text(alphabet='vllm:num_requests_runing{}="\\, 0123eE+-.\n\tNaI#', max_size=80))
def test_garbage_never_raises_anything_else(tail: str):
    try:
        load = VLLM.parse(f"vllm:num_requests_running{tail}\nvllm:num_requests_waiting{{}} 1\n")
    except MetricsError:
        return
    assert load.running >= 0


def test_which_engines_have_an_adapter():
    assert {engine for engine in EngineType if adapter_for(engine) is None} == {
        EngineType.OLLAMA,
        EngineType.OPENAI,
    }
