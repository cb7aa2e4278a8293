import numpy as np
import pytest

from pointsman_core.capacity import endpoint_capacity
from pointsman_core.cost import CostModel
from pointsman_core.manifests import ManifestErrors
from pointsman_core.resources import Admission, Algorithm
from pointsman_core.snapshot import read_snapshot
from pointsman_core.workload import WorkloadError
from pointsman_learning.workloads import (
    EDGE_EXPERTS,
    capacity,
    edge_site,
    load_pool,
    random_pool,
    with_policy,
)
from pointsman_learning.workloads.pools import BOARDS, SLOWEST_S, UNSEEN_BOARDS, room_of

EXPERT = """
apiVersion: pointsman.dev/v1alpha1
kind: LLMExpert
metadata: {name: NAME}
spec: {model: NAME, backend: {addresses: ["127.0.0.1:1", "127.0.0.1:2"]}}
---
"""
POLICY = """
apiVersion: pointsman.dev/v1alpha1
kind: RoutingPolicy
metadata: {name: NAME}
spec: {models: [NAME]}
---
"""


def test_edge_site_has_the_corpus_experts():
    snapshot = edge_site()
    assert sorted(c.model for c in snapshot.candidates) == sorted(EDGE_EXPERTS)


def test_edge_site_without_a_checkout(monkeypatch, tmp_path):
    from pointsman_learning.workloads import pools

    pools._edge_site.cache_clear()
    monkeypatch.setattr(pools, "checkout", lambda: tmp_path)
    with pytest.raises(WorkloadError, match="comes with a checkout: name manifests of your own"):
        edge_site()


def test_policy_changes_have_a_version_of_their_own():
    plain = edge_site()
    changed = edge_site(algorithm=Algorithm.RANDOM, admission=Admission.REJECT)
    assert (changed.algorithm, changed.admission) == (Algorithm.RANDOM, Admission.REJECT)
    assert changed.version != plain.version
    assert read_snapshot(changed.model_dump_json()) == changed
    assert with_policy(plain, algorithm=plain.algorithm) is plain


def test_manifests_without_a_policy(tmp_path):
    (tmp_path / "a.yaml").write_text(EXPERT.replace("NAME", "a"))
    (tmp_path / "b.yml").write_text(EXPERT.replace("NAME", "b").replace("127", "128"))
    (tmp_path / "notes.txt").write_text("no manifest")
    assert [c.expert for c in load_pool(tmp_path).candidates] == ["a", "a", "b", "b"]


def test_manifests_with_several_policies(tmp_path):
    file = tmp_path / "site.yaml"
    names = ("best", "auto", "other")
    file.write_text(
        EXPERT.replace("NAME", "a") + "".join(POLICY.replace("NAME", name) for name in names)
    )
    assert load_pool(file).policy == "auto"
    assert load_pool(file, policy="other").policy == "other"
    with pytest.raises(WorkloadError, match="has no policy mine; it has auto, best, other"):
        load_pool(file, policy="mine")


def test_bad_manifests(tmp_path):
    file = tmp_path / "site.yaml"
    file.write_text(EXPERT.replace("NAME", "a").replace("model:", "modell:"))
    with pytest.raises(ManifestErrors, match=r"site\.yaml.*modell"):
        load_pool(file)
    with pytest.raises(WorkloadError, match="cannot be read"):
        load_pool(tmp_path / "nothing.yaml")


def test_capacity_is_the_sum_over_endpoints_and_falls_with_the_limit():
    snapshot = edge_site()
    lengths = np.linspace(50.0, 300.0, len(snapshot.candidates))
    alone = [
        endpoint_capacity(
            CostModel.from_profile(c.profile, c.limits),
            input_tokens=800.0,
            output_tokens=float(length),
        )
        for c, length in zip(snapshot.candidates, lengths, strict=True)
    ]
    total = capacity(snapshot, input_tokens=800.0, output_tokens=lengths)
    assert total == pytest.approx(sum(alone))
    tight = [
        capacity(snapshot, input_tokens=800.0, output_tokens=lengths, limit_s=limit)
        for limit in (0.02, 0.05, 0.1, 10.0)
    ]
    assert tight == sorted(tight)
    assert tight[0] < total == pytest.approx(tight[-1])


def test_random_pools_vary_and_make_sense():
    rng = np.random.default_rng(0)
    pools = [random_pool(rng) for _ in range(60)]
    assert {len(p.snapshot.candidates) for p in pools} == set(range(2, 17))
    candidates = [c for p in pools for c in p.snapshot.candidates]
    assert {c.model for c in candidates} == set(EDGE_EXPERTS)
    assert len({c.profile.peak_tflops for c in candidates}) == len(BOARDS)
    assert len({c.profile.bytes_per_parameter for c in candidates}) == 3
    for pool in pools:
        assert not pool.blends
        assert len({c.model for c in pool.snapshot.candidates}) >= 2
        assert len({c.address for c in pool.snapshot.candidates}) == len(pool.snapshot.candidates)
        contexts = [c.limits.context_tokens for c in pool.snapshot.candidates]
        np.testing.assert_array_equal(room_of(pool.snapshot), contexts)
    for candidate in candidates:
        cost = CostModel.from_profile(candidate.profile, candidate.limits)
        assert cost.weights_s + cost.overhead_s <= SLOWEST_S


def test_random_pools_repeat_by_seed():
    one, same, other = (random_pool(np.random.default_rng(seed), 5) for seed in (1, 1, 2))
    assert one.snapshot == same.snapshot
    assert one.snapshot.version != other.snapshot.version
    assert len(one.snapshot.candidates) == 5


def test_small_models_are_blends():
    pool = random_pool(np.random.default_rng(0), 12, small_share=0.5)
    small = [c for c in pool.snapshot.candidates if c.expert in pool.blends]
    assert 2 <= len(small) <= 10
    for candidate in small:
        blend = pool.blends[candidate.expert]
        assert blend.first != blend.second
        assert {blend.first, blend.second} <= set(EDGE_EXPERTS)
        assert candidate.profile.parameters_billions < 4


def boards_of(pool):
    return {c.profile.peak_tflops for c in pool.snapshot.candidates}


def test_unseen_boards_are_unseen():
    assert len(UNSEEN_BOARDS) >= 5
    names = [board.name for board in (*BOARDS, *UNSEEN_BOARDS)]
    assert len(set(names)) == len(names)
    hardware = [(b.tflops, b.bandwidth_gbps, b.memory_gib) for b in (*BOARDS, *UNSEEN_BOARDS)]
    assert len(set(hardware)) == len(hardware)
    assert all(board.source for board in UNSEEN_BOARDS)


def test_pools_on_other_boards():
    pool = random_pool(np.random.default_rng(0), 60, small_share=0.15, boards=UNSEEN_BOARDS)
    assert boards_of(pool) == {board.tflops for board in UNSEEN_BOARDS}
    assert not boards_of(pool) & boards_of(random_pool(np.random.default_rng(0), 60))
    for candidate in pool.snapshot.candidates:
        cost = CostModel.from_profile(candidate.profile, candidate.limits)
        assert cost.weights_s + cost.overhead_s <= SLOWEST_S


def test_pool_of_none():
    with pytest.raises(WorkloadError, match="at least 1 endpoint"):
        random_pool(np.random.default_rng(0), 0)
