"""The learned decider on models of a few nodes: what is served, and what is refused."""

from dataclasses import asdict

import numpy as np
import onnx
import orjson
import pytest
from onnx import TensorProto, helper, numpy_helper

from pointsman_core.deciders import ImpactGreedy, ImpactParameters, han_drl
from pointsman_core.deciders.han_drl import (
    INPUTS,
    OUTPUTS,
    HanDrl,
    HanInfo,
    HanModel,
    MissingModel,
    ModelError,
)
from pointsman_core.graph import encode
from pointsman_core.onnx_session import METADATA_KEY
from pointsman_core.resources import Admission, Algorithm, QualityPriors
from pointsman_core.router import Rejection

A, B, C = "10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000"
PARAMETERS = ImpactParameters(margin=1.3, softness=0.2, impact_weight=1.5, least_value=0.1)
TYPES = {"float": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}


def model(
    *,
    reject=0.1,
    scale=1.0,
    chance_scale=1.0,
    inputs=INPUTS,
    outputs=OUTPUTS,
    metadata=None,
    keep_metadata=True,
    **changes,
):
    """ImpactGreedy as a model: q is the base; ``changes`` are made to the metadata."""
    constants = {
        "sizes": np.array([1, 1, 1]),
        "one": np.array([1]),
        "reject": np.array([reject], np.float32),
        "scale": np.array(scale, np.float32),
        "chance_scale": np.array(chance_scale, np.float32),
    }
    nodes = [
        ("Split", ["analytic", "sizes"], ["c", "i", "b"], {"axis": 1}),
        ("Squeeze", ["c", "one"], ["c1"], {}),
        ("Mul", ["c1", "chance_scale"], ["chance"], {}),
        ("Squeeze", ["i", "one"], ["impact"], {}),
        ("Squeeze", ["b", "one"], ["base"], {}),
        ("Mul", ["base", "scale"], ["scaled"], {}),
        ("Concat", ["scaled", "reject"], ["q"], {"axis": 0}),
        ("Softmax", ["q"], ["probability"], {"axis": 0}),
    ]
    graph = helper.make_graph(
        [helper.make_node(kind, ins, outs, **more) for kind, ins, outs, more in nodes],
        "test",
        [helper.make_tensor_value_info(n, TYPES[k], s) for n, (k, s) in inputs.items()],
        [helper.make_tensor_value_info(n, TYPES[k], s) for n, (k, s) in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    info = HanInfo(impact=PARAMETERS, config={"width": 4}, provenance={"seed": 1}, metrics={})
    text = orjson.dumps(orjson.loads(info.to_json()) | changes).decode()
    if keep_metadata:
        helper.set_model_props(made, {METADATA_KEY: text if metadata is None else metadata})
    return made.SerializeToString()


@pytest.fixture(scope="module")
def served():
    return HanModel(model())


@pytest.fixture
def site(build):
    """Router and state of experts a, b and c, some requests on a and b."""

    def make(**spec):
        experts = [
            build.expert(name, address, quality=QualityPriors(default=quality))
            for name, address, quality in (("a", A, 0.2), ("b", B, 0.8), ("c", C, 0.5))
        ]
        router, state = build.router(*experts, **spec)
        for name, address, tokens in (("r", A, 3), ("s", B, 0), ("t", A, 1)):
            state.begin(name, address, build.admitted(quality=0.6))
            state.add_tokens(name, tokens)
        return router, state

    return make


class TestDecider:
    def test_scores_by_the_models_values_with_the_models_own_parameters(self, site, build, served):
        router, _ = site()
        seen = router.observe(build.request(), now_s=0.02)
        got = HanDrl(served).score(seen)
        want = ImpactGreedy(PARAMETERS).score(seen)
        assert got.values == pytest.approx(want.values, abs=1e-6)
        assert got.acceptable.tolist() == want.acceptable.tolist()
        assert got.in_time.tolist() == want.in_time.tolist()
        for name in ("chance in time", "impact on others"):
            assert got.parts[name] == pytest.approx(want.parts[name], abs=1e-6)
        assert 0 < got.parts["policy probability"].sum() < 1  # the rest is rejection's

    def test_nobody_there(self, build, served):
        router, _ = build.router(build.expert("a", A))
        router.replace_decider(HanDrl(served))
        assert router.decide(build.request(), now_s=0.0).fallback_reason is None

    @pytest.mark.parametrize(("reject", "rejected"), [(-5.0, False), (5.0, True)])
    @pytest.mark.parametrize("admission", list(Admission))
    def test_rejects_where_that_is_worth_more(self, reject, rejected, admission, site, build):
        router, _ = site(admission=admission)
        router.replace_decider(HanDrl(HanModel(model(reject=reject))))
        decision = router.decide(build.request(), now_s=0.02)
        may = admission is Admission.REJECT
        assert (decision.rejection is Rejection.OVER_LIMIT) == (rejected and may)

    def test_explains_itself(self, site, build, served):
        router, _ = site()
        router.replace_decider(HanDrl(served))
        why = router.decide(build.request(), now_s=0.02).why
        for part in ("policy probability", "chance in time", "impact on others"):
            assert part in why


class TestAtRunTime:
    def test_what_is_no_number_is_left_to_the_fallback(self, site, build, served, monkeypatch):
        router, _ = site(fallback=Algorithm.QUALITY_GREEDY)
        router.replace_decider(HanDrl(served))

        class Broken:
            def run(self, _names, inputs):
                size = len(inputs["endpoint"])
                q = np.full(size + 1, np.nan, np.float32)
                return [q, q, q[:-1], q[:-1]]

        monkeypatch.setattr(served, "_session", Broken())
        decision = router.decide(build.request(), now_s=0.02)
        assert decision.algorithm is Algorithm.QUALITY_GREEDY
        assert decision.chosen.expert == "b"
        assert decision.fallback_reason.endswith("ModelError: the model: q is not a number")

    def test_so_is_a_wrong_shape(self, site, build, served, monkeypatch):
        seen = site()[0].observe(build.request(), now_s=0.02)

        class Short:
            def run(self, _names, _inputs):
                return [np.zeros(2, np.float32)] * 4

        monkeypatch.setattr(served, "_session", Short())
        with pytest.raises(ModelError, match=r"the model: q has the shape \(2,\)"):
            HanDrl(served).score(seen)

    def test_nothing_to_serve_with_is_told_to_whom_it_concerns(self, site, build):
        router, _ = site()
        router.replace_decider(MissingModel("no model is shipped with this release"))
        decision = router.decide(build.request(), now_s=0.02)
        assert decision.chosen is not None
        assert "no model is shipped with this release" in decision.fallback_reason


class TestLoading:
    def test_says_what_it_is(self):
        content = model()
        loaded = HanModel(content)
        assert loaded.info == HanInfo(
            impact=PARAMETERS, config={"width": 4}, provenance={"seed": 1}, metrics={}
        )
        assert HanModel(content, sha256=loaded.sha256.upper()).sha256 == loaded.sha256

    def test_another_checksum(self):
        content = model()
        with pytest.raises(ModelError, match=r"m.onnx has the SHA-256 [0-9a-f]{64}, not 00"):
            HanModel(content, sha256="00", source="m.onnx")

    def test_another_schema(self):
        wrong = "was trained with other features .schema abc, this release has [0-9a-f]{12}"
        with pytest.raises(ModelError, match=wrong):
            HanModel(model(schema="abc"))

    @pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
    def test_truncated(self, share):
        content = model()
        with pytest.raises(ModelError):
            HanModel(content[: int(share * len(content))])

    @pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 100, b"\x08" * 1000])
    def test_no_model_at_all(self, content):
        with pytest.raises(ModelError):
            HanModel(content)

    def test_damaged_anywhere(self):
        """It is refused, or it answers chances and finite values."""
        content = bytearray(model())
        rng = np.random.default_rng(0)
        for _ in range(60):
            damaged = content.copy()
            for place in rng.integers(0, len(content), 4):
                damaged[place] ^= int(rng.integers(1, 256))
            try:
                loaded = HanModel(bytes(damaged))
            except ModelError:
                continue
            answer = loaded.run(han_drl._probe(endpoints=2, requests=1))
            assert np.isfinite(answer.q).all()

    def test_foreign(self):
        with pytest.raises(ModelError, match="is no model of Pointsman's: it says nothing"):
            HanModel(model(keep_metadata=False))

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}'])
    def test_metadata_that_says_nothing(self, text):
        with pytest.raises(ModelError, match="is no model of Pointsman's"):
            HanModel(model(metadata=text))

    def test_another_format(self):
        with pytest.raises(ModelError, match="'pointsman-han/9'; this release serves"):
            HanModel(model(format="pointsman-han/9"))

    @pytest.mark.parametrize(
        ("provenance", "trained"),
        [({}, True), ({"trained": True}, True), ({"trained": False}, False)],
    )
    def test_whether_it_was_trained(self, provenance, trained):
        assert HanModel(model(provenance=provenance)).info.trained is trained

    @pytest.mark.parametrize(
        "impact", [None, {}, asdict(PARAMETERS) | {"margin": -1}, asdict(PARAMETERS) | {"new": 1}]
    )
    def test_parameters_of_another_release(self, impact):
        with pytest.raises(ModelError, match="unreadable metadata"):
            HanModel(model(impact=impact))

    def test_too_large(self, monkeypatch):
        monkeypatch.setattr(han_drl, "MAX_BYTES", 10)
        with pytest.raises(ModelError, match="has 11 bytes; at most 10 are read"):
            HanModel(b"x" * 11)

    def test_other_inputs(self):
        extra = dict(INPUTS) | {"more": ("float", ("E",))}
        with pytest.raises(ModelError, match=r"takes request, .*, more, not request"):
            HanModel(model(inputs=extra))

    def test_other_shapes(self):
        wrong = dict(INPUTS) | {"endpoint": ("float", ("E", 3))}
        message = r"takes endpoint as tensor\(float\) of \['E', 3\], not as tensor\(float\) of"
        with pytest.raises(ModelError, match=message):
            HanModel(model(inputs=wrong))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"scale": np.nan}, "q is not a number"),
            ({"scale": np.inf}, "q is not a number"),
            ({"chance_scale": 5.0}, "answers chances that are none"),
        ],
    )
    def test_nonsense_is_found_by_trying(self, changes, message):
        with pytest.raises(ModelError, match=message):
            HanModel(model(**changes))

    def test_without_onnx_runtime(self, monkeypatch):
        import sys

        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(ModelError, match=r"needs ONNX Runtime: pip install 'pointsman.server"):
            HanModel(model())

    def test_the_test_model_is_valid(self):
        onnx.checker.check_model(onnx.load_from_string(model()))


def test_a_graph_fits_the_inputs(site, build):
    graph = encode(site()[0].observe(build.request(), now_s=0.02))
    for name, (_, shape) in INPUTS.items():
        array = getattr(graph, name)
        assert len(array.shape) == len(shape)
        for size, want in zip(array.shape, shape, strict=True):
            assert isinstance(want, str) or size == want
