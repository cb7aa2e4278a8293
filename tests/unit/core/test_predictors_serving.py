import sys

import numpy as np
import onnx
import orjson
import pytest
from onnx import helper, numpy_helper

from pointsman_core.observation import Request
from pointsman_core.onnx_session import METADATA_KEY
from pointsman_core.prediction import DeclaredPriors
from pointsman_core.predictors import (
    Artefact,
    ArtefactError,
    LearnedPredictor,
    builtin_artefact,
    make_predictor,
    model_key,
)
from pointsman_core.predictors import artefact as artefact_module
from pointsman_core.predictors.artefact import ArtefactInfo
from pointsman_core.predictors.features import FEATURES
from pointsman_core.resources import QualityPriors
from pointsman_core.router import Router
from pointsman_core.state import LiveState

A, B = "10.0.0.1:8000", "10.0.0.2:8000"


def make(quality=(0.2, 0.9), *, columns=None, info=None, key=METADATA_KEY, tokens=(40.0, np.nan)):
    """A graph that answers constants, whatever the prompt."""
    size = len(quality)
    told = info or ArtefactInfo(
        experts=("small", "Big")[:size],
        embedding=0,
        lengths=tuple(bool(np.isfinite(one)) for one in tokens),
        provenance={},
        metrics={},
    )
    nodes = [
        helper.make_node("ReduceMax", ["features"], ["most"], axes=[1], keepdims=1),
        helper.make_node("Mul", ["most", "zero"], ["nothing"]),
    ]
    constants = {
        "zero": [[0.0]],
        "quality_of": [quality],
        "uncertainty_of": [[0.1] * size],
        "output_tokens_of": [tokens],
    }
    outputs = ("quality", "uncertainty", "output_tokens")
    nodes += [helper.make_node("Add", ["nothing", f"{name}_of"], [name]) for name in outputs]
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [tensor("features", onnx.TensorProto.FLOAT, ["n", columns or FEATURES])],
        [tensor(name, onnx.TensorProto.FLOAT, ["n", size]) for name in outputs],
        [numpy_helper.from_array(np.array(v, np.float32), k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, {key: told if isinstance(told, str) else told.to_json()})
    return model.SerializeToString()


def metadata(**changes):
    info = ArtefactInfo(("small", "Big"), 0, (True, False), {}, {})
    return orjson.dumps(orjson.loads(info.to_json()) | changes).decode()


@pytest.fixture
def artefact():
    return Artefact(make())


def test_answers_have_a_row_per_prompt(artefact):
    said = artefact.predict(["one", "two", "three"], batch=2)
    assert said.quality == pytest.approx(np.tile([0.2, 0.9], (3, 1)))
    assert said.uncertainty.shape == said.output_tokens.shape == (3, 2)
    assert np.isnan(said.output_tokens[:, 1]).all()


def test_no_prompts_are_no_error(artefact):
    assert artefact.predict([]).quality.shape == (0, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "p.onnx is no ONNX file that can be run"),
        (b"rubbish" * 100, "p.onnx is no ONNX file that can be run"),
        (make()[:-200], "p.onnx is no ONNX file that can be run"),
        (make(key="other"), "p.onnx is an ONNX file, but no predictor of quality"),
        (make(info="{"), "p.onnx has damaged metadata"),
        (make(info=metadata(experts=None)), "p.onnx has damaged metadata"),
        (make(info=metadata(experts=[])), "p.onnx has damaged metadata: experts do not match"),
        (make(info=metadata(lengths=[True])), "p.onnx has damaged metadata: experts do not match"),
        (make(info=metadata(schema="0" * 16)), "with features 0000000000000000; this release has"),
        (make(info=metadata(format="x/9")), "was made for format x/9"),
        (make(columns=7), "p.onnx takes {'features': 7}, not {'features': "),
        (
            make(info=metadata(experts=["a", "b", "c"], lengths=[False] * 3)),
            "p.onnx names 3 experts, but answers",
        ),
        (make((0.2, float("nan"))), "p.onnx predicts nonsense of Big"),
        (make((1.2, 0.5)), "p.onnx predicts nonsense of small"),
        (make(tokens=(0.0, np.nan)), "p.onnx predicts nonsense of small"),
    ],
)
def test_what_is_no_predictor_is_refused(content, message):
    with pytest.raises(ArtefactError) as refused:
        Artefact(content, source="p.onnx")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_huge_file_is_refused_before_it_is_parsed(monkeypatch):
    monkeypatch.setattr(artefact_module, "MAX_BYTES", 10)
    with pytest.raises(ArtefactError, match="has 11 bytes; at most 10 are read"):
        Artefact(b"x" * 11)


def test_the_missing_runtime_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ArtefactError, match=r"x\.onnx needs ONNX Runtime: pip install"):
        Artefact(b"any", source="x.onnx")


def test_one_that_needs_embeddings_cannot_be_served(artefact, build, monkeypatch):
    info = ArtefactInfo(("small", "Big"), 384, (True, False), {}, {})
    monkeypatch.setattr(artefact, "info", info)
    with pytest.raises(ValueError, match="needs sentence embeddings of the prompts"):
        artefact.predict(["x"])
    with pytest.raises(ValueError, match="only predictors on n-grams can be served"):
        LearnedPredictor(artefact, build.snapshot(build.expert("small", A)))


# --- candidates ------------------------------------------------------------------------


def test_known_experts_are_learned_and_others_declared(artefact, build):
    known = build.expert("known", A, aliases=["org/BIG"], quality=QualityPriors(default=0.3))
    other = build.expert("other", B, quality=QualityPriors(default=0.4), expected_output_tokens=70)
    said = LearnedPredictor(artefact, build.snapshot(known, other)).predict("hello")
    assert said.quality == pytest.approx([0.9, 0.4])
    assert said.learned.tolist() == [True, False]
    assert said.output_tokens[1] == 70


def test_learned_lengths_are_used_where_there_are_some(artefact, build):
    small = build.expert("a", A, aliases=["small"], expected_output_tokens=70)
    big = build.expert("b", B, aliases=["big"], expected_output_tokens=80)
    said = LearnedPredictor(artefact, build.snapshot(small, big)).predict("hello")
    assert said.output_tokens == pytest.approx([40.0, 80.0])


def test_the_publisher_and_case_of_a_name_do_not_matter(artefact, build):
    expert = build.expert("a", A, aliases=["vendor/Small"])
    said = LearnedPredictor(artefact, build.snapshot(expert)).predict("hello")
    assert said.quality == pytest.approx([0.2])


def test_a_quantised_model_is_another_expert(artefact, build):
    snapshot = build.snapshot(build.expert("a", A, aliases=["small-awq"]))
    assert isinstance(make_predictor(artefact, snapshot), DeclaredPriors)


def test_without_an_artefact_priors_are_declared(build):
    assert isinstance(make_predictor(None, build.snapshot(build.expert("a", A))), DeclaredPriors)


@pytest.mark.parametrize(
    ("name", "key"),
    [("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b-instruct"), ("x", "x"), ("a/b/C", "c")],
)
def test_model_key(name, key):
    assert model_key(name) == key


def test_a_decision_says_where_its_quality_is_from(artefact, build):
    known = build.expert("known", A, aliases=["big"], quality=QualityPriors(default=0.3))
    other = build.expert("other", B, quality=QualityPriors(default=0.95))
    request = Request(prompt="hello", prompt_tokens=3, arrival_s=0.0, limit_s=1.0)
    for experts, why, learned in (
        ((known,), "expected quality 0.90 (learned)", True),
        ((known, other), "expected quality 0.95 (declared)", False),
    ):
        snapshot = build.snapshot(*experts, algorithm="QualityGreedy")
        state = LiveState()
        state.set_endpoints(c.address for c in snapshot.candidates)
        predictor = make_predictor(artefact, snapshot)
        decision = Router(snapshot, state, predictor=predictor, seed=0).decide(request, now_s=0.0)
        assert why in decision.why
        assert decision.learned is learned


# --- the shipped one -------------------------------------------------------------------


def test_the_builtin_predictor_knows_its_experts_and_its_past():
    artefact = builtin_artefact()
    assert "qwen2.5-7b-instruct" in artefact.info.experts
    assert artefact.info.provenance["split"] == "train"
    assert artefact.info.metrics["out_of_fold"]["chosen"]["mean"] > 0.6
    assert not any(artefact.info.lengths)


def test_the_builtin_predictor_tells_code_from_chat():
    artefact = builtin_artefact()
    code, question = artefact.predict(
        ["Write a function to find the longest common prefix.", "who sang the song yesterday"]
    ).quality
    mistral = artefact.info.experts.index("mistral-7b-instruct-v0.3")
    qwen = artefact.info.experts.index("qwen2.5-7b-instruct")
    assert code[qwen] > code[mistral] + 0.3
    assert abs(question[qwen] - question[mistral]) < 0.2
