"""Models of HanDrl in the policy server: loaded, swapped, refused, told."""

import hashlib
from importlib import resources

import onnx
import pytest

from pointsman_core.deciders import han_drl
from pointsman_core.deciders.han_drl import shipped_model
from pointsman_core.resources import QualityPriors
from pointsman_policy.control import SnapshotIntake, SnapshotServicer
from pointsman_policy.metrics import Metrics
from pointsman_policy.models import ModelStore
from pointsman_policy.policy_api import PolicyServicer
from pointsman_policy.service import Limits, RoutingService
from pointsman_policy.snapshots import SnapshotBoard
from pointsman_proto.v1 import pointsman_pb2 as pb

A, B = "10.0.0.1:8000", "10.0.0.2:8000"
POLICY = "default/auto"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models that differ in their metadata only, a corrupt one and a foreign one."""
    folder = tmp_path_factory.mktemp("models")
    shipped = resources.files("pointsman_core") / "models" / han_drl.SHIPPED
    content = shipped.read_bytes()
    for name in ("one", "two"):
        model = onnx.load_from_string(content)
        helper = model.metadata_props.add()
        helper.key, helper.value = "name", name
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
    (folder / "corrupt.onnx").write_bytes(content[: len(content) // 2])
    model = onnx.load_from_string(content)
    del model.metadata_props[:]
    (folder / "foreign.onnx").write_bytes(model.SerializeToString())
    return folder


@pytest.fixture
def reference(folder):
    def make(name):
        content = (folder / name).read_bytes()
        return {"file": name, "sha256": hashlib.sha256(content).hexdigest()}

    return make


def absent(name):
    return {"file": name, "sha256": "0" * 64}


@pytest.fixture
def install(build, folder):
    """Service over ``folder``, and how to put a policy in force there."""
    service = RoutingService(Metrics(), seed=0, models=ModelStore(folder))
    good = build.expert("good", A, quality=QualityPriors(default=0.9))
    fast = build.expert("fast", B, quality=QualityPriors(default=0.4))

    def put(model=None, **spec):
        spec = {"algorithm": "HanDrl", "fallback": "RoundRobin"} | spec
        service.install([build.snapshot(good, fast, model=model, **spec)])
        return service

    return put


def decide(service, build):
    request = build.request(arrival_s=service.clock())
    return service.decide(service.router("auto"), request)


def info(service, counted, sha256):
    return counted(service, "model_info", policy=POLICY, sha256=sha256)


class TestInForce:
    def test_the_shipped_one_where_none_is_named(self, install, build, counted):
        service = install()
        assert service.model(POLICY).model is shipped_model()
        assert decide(service, build).algorithm == "HanDrl"
        assert info(service, counted, shipped_model().sha256) == 1

    def test_the_named_one(self, install, reference, build, counted):
        one = reference("one.onnx")
        service = install(one)
        assert service.model(POLICY).model.sha256 == one["sha256"]
        assert decide(service, build).fallback_reason is None
        assert info(service, counted, one["sha256"]) == 1

    def test_other_algorithms_need_none(self, install):
        assert install(algorithm="LeastLoad").model(POLICY) is None

    def test_is_loaded_once(self, install, reference):
        before = install(reference("one.onnx")).model(POLICY).model
        install(reference("two.onnx"))
        assert install(reference("one.onnx")).model(POLICY).model is before

    def test_old_ones_are_forgotten(self, install, reference, monkeypatch):
        monkeypatch.setattr("pointsman_policy.models.MAX_LOADED", 1)
        before = install(reference("one.onnx")).model(POLICY).model
        install(reference("two.onnx"))
        assert install(reference("one.onnx")).model(POLICY).model is not before

    def test_they_are_prepared_beside_the_event_loop(self, build, folder, reference, monkeypatch):
        store = ModelStore(folder)
        good = build.expert("good", A)
        wanted = build.snapshot(good, algorithm="HanDrl", model=reference("one.onnx"))
        wrong = build.snapshot(good, algorithm="HanDrl", model=reference("corrupt.onnx"))
        missing = build.snapshot(good, algorithm="HanDrl", model=absent("gone.onnx"))
        store.prepare([wanted, wrong, missing, build.snapshot(good)])
        monkeypatch.setattr(
            ModelStore, "_load", lambda _, reference: store._loaded[reference.sha256]
        )
        assert store.of(wanted, None).error == ""
        assert "corrupt.onnx is no ONNX model" in store.of(wrong, None).error
        assert "gone.onnx cannot be read" in store.of(missing, None).error

    def test_what_failed_is_tried_again_when_it_is_prepared_again(self, build, folder, tmp_path):
        store = ModelStore(tmp_path)
        content = (folder / "one.onnx").read_bytes()
        model = {"file": "late.onnx", "sha256": hashlib.sha256(content).hexdigest()}
        wanted = build.snapshot(build.expert("good", A), algorithm="HanDrl", model=model)
        store.prepare([wanted])
        assert "late.onnx cannot be read" in store.of(wanted, None).error
        (tmp_path / "late.onnx").write_bytes(content)
        store.prepare([wanted])
        assert store.of(wanted, None).error == ""

    def test_none_in_use_is_forgotten(self, build, folder, reference, monkeypatch):
        monkeypatch.setattr("pointsman_policy.models.MAX_LOADED", 1)
        store, good = ModelStore(folder), build.expert("good", A)
        both = [
            build.snapshot(good, algorithm="HanDrl", name=name, model=reference(f"{name}.onnx"))
            for name in ("one", "two")
        ]
        store.prepare(both)
        monkeypatch.setattr(ModelStore, "_read", None)
        assert [store.of(each, None).error for each in both] == ["", ""]

    def test_the_shipped_one_is_not_loaded_where_another_is_named(
        self, install, reference, monkeypatch
    ):
        def loaded():
            raise AssertionError("in the event loop")

        monkeypatch.setattr(han_drl, "shipped_model", loaded)
        assert install(reference("one.onnx")).model(POLICY).error == ""


class TestSwap:
    def test_no_decision_is_lost_or_left_to_the_fallback(self, install, reference, build, counted):
        service = install(reference("one.onnx"))
        fallbacks = set()
        for number in range(40):
            if number % 5 == 0:
                install(reference(("two.onnx", "one.onnx")[number % 2]))
            decision = decide(service, build)
            assert decision.chosen is not None
            fallbacks.add(decision.fallback_reason)
        assert fallbacks == {None}
        made = sum(
            counted(service, "decisions_total", policy=POLICY, algorithm="HanDrl", expert=expert)
            for expert in ("good", "fast")
        )
        assert made == 40

    def test_a_request_on_its_way_stays(self, install, reference, build):
        service = install(reference("one.onnx"))
        service.state.begin("r", A, build.admitted())
        install(reference("two.onnx"))
        assert "r" in service.state


WRONG = {
    "corrupt.onnx": "corrupt.onnx is no ONNX model",
    "foreign.onnx": "foreign.onnx is no model of Pointsman's",
}


class TestRefused:
    @pytest.mark.parametrize(("name", "message"), WRONG.items())
    def test_the_one_before_goes_on(self, name, message, install, reference, build, counted):
        one = reference("one.onnx")
        install(one)
        service = install(reference(name))
        assert message in service.model(POLICY).error
        assert service.model(POLICY).model.sha256 == one["sha256"]
        assert decide(service, build).fallback_reason is None
        assert counted(service, "model_failures_total", policy=POLICY) == 1

    @pytest.mark.parametrize(("name", "message"), WRONG.items())
    def test_without_one_before_the_fallback_decides(
        self, name, message, install, reference, build, counted
    ):
        service = install(reference(name))
        decision = decide(service, build)
        assert decision.algorithm == "RoundRobin"
        assert message in decision.fallback_reason
        labels = {"policy": POLICY, "algorithm": "RoundRobin"}
        assert counted(service, "fallbacks_total", **labels) == 1

    def test_another_checksum(self, install, reference):
        wrong = reference("one.onnx") | {"sha256": "0" * 64}
        error = install(wrong).model(POLICY).error
        assert error.startswith("one.onnx has the SHA-256 ")
        assert error.endswith(f"not {'0' * 64}")

    def test_no_such_file(self, install):
        error = install({"file": "none.onnx", "sha256": "0" * 64}).model(POLICY).error
        assert error == "none.onnx cannot be read: No such file or directory"

    def test_no_folder(self, build, reference):
        snapshot = build.snapshot(
            build.expert("good", A), algorithm="HanDrl", model=reference("one.onnx")
        )
        error = ModelStore().of(snapshot, None).error
        assert error == "one.onnx: the policy server has no folder of models (--models)"

    def test_it_is_tried_again_when_snapshots_are_put_in_force_again(self, install, build, folder):
        content = (folder / "one.onnx").read_bytes()
        late = {"file": "late.onnx", "sha256": hashlib.sha256(content).hexdigest()}
        service = install(late)
        assert service.model(POLICY).error
        (folder / "late.onnx").write_bytes(content)
        install(late)
        assert service.model(POLICY).error == ""
        assert decide(service, build).algorithm == "HanDrl"


class Context:
    async def abort(self, code, message):
        raise AssertionError(code, message)


async def test_explain_tells_what_the_model_estimates(install):
    service = install()
    request = pb.ExplainRequest(request=pb.DecideRequest(model="auto", prompt="hello"))
    got = await PolicyServicer(service).Explain(request, Context())
    assert got.decision.algorithm == "HanDrl"
    assert 0 < sum(c.policy_probability for c in got.candidates) < 1
    for candidate in got.candidates:
        assert 0 < candidate.chance_in_time <= 1
        assert candidate.impact_on_others == 0.0
        assert candidate.expected_quality > 0
        assert candidate.predicted_latency_per_token_ms > 0
    install(algorithm="LeastLoad")
    got = await PolicyServicer(service).Explain(request, Context())
    assert not got.candidates[0].HasField("policy_probability")


async def test_past_requests_keep_what_was_estimated(install):
    from pointsman_policy.openai_api import parse_completion

    service = install()
    completion = parse_completion(b'{"model": "auto", "prompt": "x"}')
    service.route(completion, Limits(), request_id="r1", arrival_s=service.clock())
    got = await PolicyServicer(service).Explain(pb.ExplainRequest(request_id="r1"), Context())
    assert all(c.HasField("policy_probability") for c in got.candidates)


async def test_the_operator_is_told(build, folder, reference):
    service = RoutingService(Metrics(), seed=0, models=ModelStore(folder))
    board = SnapshotBoard(service.install)
    intake = SnapshotIntake(board, service.metrics, prepare=service.model_store.prepare)
    servicer = SnapshotServicer(service, intake)

    async def publish(sequence, **spec):
        snapshot = build.snapshot(build.expert("good", A), **spec)
        item = pb.PublishedSnapshot(
            namespace=snapshot.namespace,
            policy=snapshot.policy,
            generation=snapshot.generation,
            version=snapshot.version,
            snapshot_json=snapshot.model_dump_json().encode(),
        )
        request = pb.PublishRequest(publisher="p", sequence=sequence, snapshots=[item])
        (applied,) = (await servicer.Publish(request, Context())).applied
        return applied.model_sha256, applied.model_error

    one = reference("one.onnx")
    assert await publish(1, algorithm="HanDrl", model=one) == (one["sha256"], "")
    sha256, error = await publish(2, algorithm="HanDrl", model=reference("corrupt.onnx"))
    assert sha256 == one["sha256"]
    assert "corrupt.onnx is no ONNX model" in error
    assert await publish(3, algorithm="LeastLoad") == ("", "")
