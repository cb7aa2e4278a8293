import pytest

from pointsman_core.predictors import ArtefactError, builtin_artefact
from pointsman_core.resources import QualityPriors
from pointsman_policy.metrics import Metrics
from pointsman_policy.openai_api import parse_completion
from pointsman_policy.predictor_file import load_predictor
from pointsman_policy.service import Limits, RoutingService


def test_none_is_none():
    assert load_predictor("none") is None


def test_builtin_is_the_shipped_one():
    assert load_predictor("builtin") is builtin_artefact()


def test_a_file_that_is_absent_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.onnx"):
        load_predictor(str(tmp_path / "gone.onnx"))


def test_a_file_that_is_no_predictor_is_named(tmp_path):
    file = tmp_path / "bad.onnx"
    file.write_bytes(b"rubbish")
    with pytest.raises(ArtefactError, match=r"bad\.onnx is no ONNX file"):
        load_predictor(str(file))


@pytest.mark.parametrize(
    ("alias", "source"), [("Qwen/Qwen2.5-7B-Instruct", "learned"), ("mine", "declared")]
)
def test_decisions_are_counted_by_where_quality_is_from(build, counted, alias, source):
    service = RoutingService(Metrics(), seed=0, artefact=load_predictor("builtin"))
    prior = QualityPriors(default=0.123)
    expert = build.expert("one", "10.0.0.1:8000", aliases=[alias], quality=prior)
    service.install([build.snapshot(expert, algorithm="QualityGreedy")])
    completion = parse_completion(
        b'{"model": "auto", "messages": [{"role": "user", "content": "What is 2 + 2?"}]}'
    )
    decision = service.route(completion, Limits(), request_id="r", arrival_s=service.clock())
    assert decision.learned is (source == "learned")
    assert bool(decision.quality[0] == 0.123) is (source == "declared")
    assert counted(service, "quality_sources_total", policy="default/auto", source=source) == 1
