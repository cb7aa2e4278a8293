from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest

from pointsman_cli.demo.compare import scenario_of, simulate_all
from pointsman_cli.demo.errors import DemoError
from pointsman_cli.demo.load import plan
from pointsman_cli.demo.options import DemoOptions, WorkloadName
from pointsman_cli.demo.runner import MAX_OUTPUT_TOKENS, DemoPlan, prepare
from pointsman_core.resources import Admission, Algorithm
from pointsman_engine_sim.answers import Answer

MANIFESTS = """
apiVersion: pointsman.dev/v1alpha1
kind: LLMExpert
metadata: {name: able}
spec:
  model: able-7b
  backend: {addresses: ["127.0.0.1:2"]}
  quality: {default: 0.5, domains: [{name: code, score: 0.9}]}
  expectedOutputTokens: 60
---
apiVersion: pointsman.dev/v1alpha1
kind: LLMExpert
metadata: {name: weak}
spec:
  model: weak-3b
  backend: {addresses: ["127.0.0.1:1"]}
  limits: {contextTokens: 900}
  quality: {default: 0.2}
  expectedOutputTokens: 400
---
apiVersion: pointsman.dev/v1alpha1
kind: RoutingPolicy
metadata: {name: auto}
spec:
  models: [auto]
  qos: {latencyPerTokenMs: 80, timeToFirstTokenMs: 900}
  domains: [{name: code, keywords: [function]}]
"""


@pytest.fixture
def prepared(tmp_path: Path) -> DemoPlan:
    (tmp_path / "site.yaml").write_text(MANIFESTS)
    options = DemoOptions(
        seconds=10,
        rate=4.0,
        deciders=(),
        manifests=tmp_path / "site.yaml",
        output_dir=tmp_path,
        workload=WorkloadName.SYNTHETIC,
        limit_ms=None,
        seed=5,
        keep_running=False,
    )
    return prepare(options)


def with_policy(prepared: DemoPlan, **spec) -> DemoPlan:
    policy = prepared.site.policy
    changed = policy.model_copy(update={"spec": policy.spec.model_copy(update=spec)})
    return replace(prepared, site=replace(prepared.site, policy=changed))


def test_a_scenario_holds_what_is_sent(prepared):
    scenario = scenario_of(prepared)
    assert [c.expert for c in scenario.snapshot.candidates] == ["able", "weak"]
    assert scenario.seed == 5
    assert scenario.arrival_s.tolist() == prepared.workload.arrivals.seconds.tolist()
    assert set(scenario.limit_s) == {0.08}
    assert set(scenario.first_token_limit_s) == {0.9}
    requests = plan(
        prepared.workload,
        model="auto",
        max_tokens=MAX_OUTPUT_TOKENS,
        max_input_tokens=prepared.max_input_tokens,
    )
    for i, request in enumerate(requests):
        text = orjson.loads(request.body)["messages"][0]["content"]
        assert scenario.prompt_tokens[i] == -(-len(text) // 4)
        lengths = [
            min(256, Answer(model=model, prompt=text, seed=5).natural_tokens(mean))
            for model, mean in (("able-7b", 60), ("weak-3b", 400))
        ]
        assert scenario.output_tokens[i].tolist() == lengths
        able = 0.9 if "function" in text.lower() else 0.5
        assert scenario.predicted_quality[i].tolist() == [able, 0.2]
        # A router knows what the request allows.
        assert scenario.predicted_output_tokens[i].tolist() == [60, 256]
    scores = prepared.workload.scores
    assert np.array_equal(scenario.score, scores)
    assert scenario.description == prepared.workload.description


def test_all_deciders_get_the_same_requests_and_choose_their_own_way(prepared):
    random, in_turn, best = simulate_all(
        prepared, [Algorithm.RANDOM, Algorithm.ROUND_ROBIN, Algorithm.QUALITY_GREEDY]
    )
    assert [run.decider for run in (random, in_turn, best)] == [
        *("Random", "RoundRobin", "QualityGreedy"),
    ]
    assert {run.requests for run in (random, in_turn, best)} == {40}
    assert in_turn.answered_by == ["able", "weak"] * 20
    assert best.answered_by == ["able"] * 40
    assert set(random.answered_by) == {"able", "weak"}
    (again,) = simulate_all(prepared, [Algorithm.RANDOM])
    assert again.answered_by == random.answered_by
    assert (best.failed, best.rejected, best.in_flight_at_end) == (0, 0, 0)
    assert best.host.cpu_busy is None


def test_qos_is_graded_as_in_the_data_plane(prepared):
    (run,) = simulate_all(prepared, [Algorithm.QUALITY_GREEDY])
    scores = prepared.workload.scores[:, 0]
    late = sum(ms > 80 for ms in run.ms_per_token)
    assert run.late == late
    assert set(np.flatnonzero(run.qos)) <= set(np.flatnonzero(scores))
    assert run.mean_quality == pytest.approx(scores.mean())


def test_the_policys_admission_holds(prepared):
    slow = replace(with_policy(prepared, admission=Admission.REJECT), limit_ms=80)
    crowd = replace(prepared.workload.arrivals, seconds=np.linspace(0.0, 0.01, 40))
    crowded = replace(slow, workload=replace(slow.workload, arrivals=crowd))
    (run,) = simulate_all(crowded, [Algorithm.SHORTEST_QUEUE])
    assert run.rejected > 0
    assert run.rejected + sum(name is not None for name in run.answered_by) == 40
    assert run.failures == {"no endpoint was chosen": run.rejected}


def test_a_decider_that_fails_is_no_other_in_its_name(prepared, monkeypatch):
    monkeypatch.delenv("POINTSMAN_MODELS", raising=False)
    reference = {"file": "gone.onnx", "sha256": "0" * 64}
    policy = prepared.site.policy.model_dump(mode="json", by_alias=True, exclude_none=True)
    policy["spec"] |= {"algorithm": "HanDrl", "model": reference}
    site = replace(prepared.site, policy=type(prepared.site.policy).model_validate(policy))
    with pytest.raises(DemoError, match=r"--compare: at request 0: HanDrl failed: .*gone\.onnx"):
        simulate_all(replace(prepared, site=site), [Algorithm.HAN_DRL])


def test_a_shared_address_cannot_be_simulated(prepared):
    able, weak = prepared.site.experts
    moved = weak.model_copy(
        update={"spec": weak.spec.model_copy(update={"backend": able.spec.backend})}
    )
    site = replace(prepared.site, experts=(able, moved))
    with pytest.raises(DemoError, match=r"two candidates share the address 127\.0\.0\.1:2"):
        simulate_all(replace(prepared, site=site), [Algorithm.RANDOM])


def test_a_predictor_that_is_not_there_is_told(prepared, monkeypatch):
    monkeypatch.setenv("POINTSMAN_PREDICTOR", "gone.onnx")
    with pytest.raises(DemoError, match=r"--compare: .*gone\.onnx"):
        simulate_all(prepared, [Algorithm.RANDOM])
