import pytest

from pointsman_cli.demo.site import (
    Site,
    clone_model,
    clone_policy,
    declared_score,
    is_loopback,
    load_site,
    to_yaml,
    with_addresses,
    with_limit,
)
from pointsman_core.manifests import ManifestErrors, compile_manifests
from pointsman_core.resources import Algorithm

MANIFESTS = """
apiVersion: pointsman.dev/v1alpha1
kind: LLMExpert
metadata: {name: small, labels: {site: edge}}
spec:
  model: small-7b
  backend: {addresses: ["127.0.0.1:18001", "10.0.0.9:8000"]}
  quality: {default: 0.4, domains: [{name: code, score: 0.9}]}
---
apiVersion: pointsman.dev/v1alpha1
kind: LLMExpert
metadata: {name: other, labels: {site: away}}
spec:
  model: other-7b
  backend: {addresses: ["127.0.0.1:18002"]}
---
apiVersion: pointsman.dev/v1alpha1
kind: RoutingPolicy
metadata: {name: first-by-name}
spec:
  models: [elsewhere]
  selector: {matchLabels: {site: away}}
---
apiVersion: pointsman.dev/v1alpha1
kind: RoutingPolicy
metadata: {name: main}
spec:
  models: [auto, best]
  selector: {matchLabels: {site: edge}}
  qos: {latencyPerTokenMs: 70}
  domains: [{name: code, keywords: [function]}]
"""


@pytest.fixture
def site() -> Site:
    return load_site({"site.yaml": MANIFESTS})


def test_takes_the_policy_that_answers_auto_and_its_experts(site):
    assert site.policy.metadata.name == "main"
    assert [expert.metadata.name for expert in site.experts] == ["small"]
    assert site.expert("small") is site.experts[0]
    assert site.expert("other") is None


def test_takes_the_first_policy_by_name_where_none_answers_auto():
    text = MANIFESTS.replace("models: [auto, best]", "models: [best]")
    assert load_site({"site.yaml": text}).policy.metadata.name == "first-by-name"


def test_errors_in_manifests_are_passed_on():
    with pytest.raises(ManifestErrors, match=r"spec\.qos\.latencyPerTokenMs"):
        load_site({"site.yaml": MANIFESTS.replace("70", "-70")})


def test_moves_endpoints_of_one_expert(site):
    moved = with_addresses(site, {("small", "127.0.0.1:18001"): "127.0.0.1:50001"})
    assert moved.experts[0].spec.backend.addresses == ["127.0.0.1:50001", "10.0.0.9:8000"]
    assert site.experts[0].spec.backend.addresses == ["127.0.0.1:18001", "10.0.0.9:8000"]
    unmoved = with_addresses(site, {("another", "127.0.0.1:18001"): "127.0.0.1:50001"})
    assert unmoved == site


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1:80", True), ("127.8.0.1:80", True), ("[::1]:80", True), ("10.0.0.1:80", False)],
)
def test_loopback_addresses(address, expected):
    assert is_loopback(address) is expected


def test_clone_decides_by_another_algorithm_and_explains_itself(site):
    clone = clone_policy(site.policy, Algorithm.SHORTEST_QUEUE)
    assert clone.metadata.name == "main-shortestqueue"
    assert clone.spec.models == ["auto/ShortestQueue"]
    assert clone.spec.models == [clone_model(site.policy, Algorithm.SHORTEST_QUEUE)]
    assert clone.spec.algorithm is Algorithm.SHORTEST_QUEUE
    assert clone.spec.explain_headers
    unchanged = {"models", "algorithm", "model", "explain_headers"}
    assert clone.spec.model_dump(exclude=unchanged) == site.policy.spec.model_dump(
        exclude=unchanged
    )


def test_only_a_clone_that_decides_by_a_model_names_the_policys_own():
    model = f"algorithm: HanDrl\n  model: {{file: a.onnx, sha256: {'a' * 64}}}"
    text = MANIFESTS.replace("qos: {latencyPerTokenMs: 70}", model)
    site = load_site({"site.yaml": text})
    # Another algorithm that names one would be refused.
    compiled = compile_manifests({"demo.yaml": to_yaml(site, list(Algorithm))})
    named = {s.models[0] for s in compiled.snapshots if s.model is not None}
    assert named == {"auto", "auto/HanDrl"}


@pytest.mark.parametrize("separator", ["-", "."])
def test_name_of_a_clone_stays_a_label(site, separator):
    metadata = site.policy.metadata.model_copy(update={"name": "a" * 39 + separator + "b" * 23})
    policy = site.policy.model_copy(update={"metadata": metadata})
    name = clone_policy(policy, Algorithm.LATENCY_QUALITY_GREEDY).metadata.name
    assert name == "a" * 39 + "-latencyqualitygreedy"
    assert len(name) <= 63


def test_written_manifests_compile_to_one_snapshot_per_decider_beside_the_policy(site):
    text = to_yaml(with_limit(site, 25), list(Algorithm))
    compiled = compile_manifests({"demo.yaml": text})
    snapshots = {snapshot.models: snapshot for snapshot in compiled.snapshots}
    assert len(snapshots) == 1 + len(Algorithm)
    assert snapshots["auto", "best"].algorithm is site.policy.spec.algorithm
    assert snapshots["auto/Random",].algorithm is Algorithm.RANDOM
    for snapshot in compiled.snapshots:
        assert snapshot.qos.latency_per_token_ms == 25
        assert [c.address for c in snapshot.candidates] == ["10.0.0.9:8000", "127.0.0.1:18001"]


@pytest.mark.parametrize(
    ("limit_ms", "first_ms"), [(70, 1000), (1000, 1000), (2000, 2000)], ids=["below", "at", "above"]
)
def test_a_limit_above_that_of_the_first_token_raises_it(limit_ms, first_ms):
    text = MANIFESTS.replace("PerTokenMs: 70", "PerTokenMs: 70, timeToFirstTokenMs: 1000")
    site = with_limit(load_site({"site.yaml": text}), limit_ms)
    (snapshot, *_) = compile_manifests({"demo.yaml": to_yaml(site, [])}).snapshots
    assert snapshot.qos.latency_per_token_ms == limit_ms
    assert snapshot.qos.time_to_first_token_ms == first_ms


@pytest.mark.parametrize(
    ("prompt", "score"), [("Write a Function", 0.9), ("Who was it?", 0.4)], ids=["domain", "none"]
)
def test_declared_score_follows_the_domain(site, prompt, score):
    assert declared_score(site, site.experts[0], prompt) == score
