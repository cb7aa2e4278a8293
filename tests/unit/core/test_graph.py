"""What the learned decider is given: sizes, meanings, bounds, independence of order."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman_core import graph
from pointsman_core.deciders import ImpactParameters
from pointsman_core.deciders.impact import expected_impact
from pointsman_core.graph import BOUND, FEATURES, bounded, encode, schema_hash
from pointsman_core.resources import QualityPriors
from pointsman_core.state import EngineLoad

A, B, C = "10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000"


@pytest.fixture
def site(build):
    """Router and state of experts a, b and c; two requests run on a, one waits on b."""
    experts = [
        build.expert(name, address, quality=QualityPriors(default=quality))
        for name, address, quality in (("a", A, 0.2), ("b", B, 0.8), ("c", C, 0.5))
    ]
    router, state = build.router(*experts)
    for name, address, tokens in (("r", A, 3), ("s", B, 0), ("t", A, 1)):
        state.begin(name, address, build.admitted(quality=0.6))
        state.add_tokens(name, tokens)
    return router, state


@pytest.fixture
def seen(site, build):
    return site[0].observe(build.request(arrival_s=0.02), now_s=0.02)


def column(rows, kind, name):
    return rows[:, list(FEATURES[kind]).index(name)]


def squashed(value):
    return value / (1 + abs(value) / BOUND)


def test_shapes_and_who_is_where(seen):
    got = encode(seen)
    assert got.request.shape == (1, len(FEATURES["request"]))
    assert got.endpoint.shape == (3, len(FEATURES["endpoint"]))
    assert got.running.shape == (2, len(FEATURES["running"]))
    assert got.waiting.shape == (1, len(FEATURES["waiting"]))
    assert got.running_endpoint.tolist() == [0, 0]
    assert got.waiting_endpoint.tolist() == [1]
    assert got.eligible.tolist() == [True] * 3
    arrays = (got.request, got.endpoint, got.running, got.waiting, got.analytic)
    assert all(array.dtype == np.float32 and array.flags.c_contiguous for array in arrays)


def test_nobody_there(build):
    router, _ = build.router(build.expert("a", A))
    got = encode(router.observe(build.request(), now_s=0.0))
    assert got.running.shape == (0, len(FEATURES["running"]))
    assert got.waiting_endpoint.shape == (0,)


class TestMeanings:
    """By hand on the round profile: 1 ms + max(1 ms per token, 2 ms + 1 us per context token)."""

    def test_of_an_endpoint(self, seen):
        rows = encode(seen).endpoint
        limit, full = 0.06, 1e-3 + max(4 * 1e-3, 2e-3 + 1024e-6)
        for name, want in {
            "prefill": 100 * 1e-3 / (limit * 10),
            "idle step": 3e-3 / limit,
            "full step": full / limit,
            "arithmetic": 4e-3 / full,
            "chunks": 100 / 512,
            "slots": 4 / 256,
            "output": 10 / 256,
            "KV use": 0.0,
            "KV known": 0.0,
            "first token limit": 0.0,
        }.items():
            assert column(rows, "endpoint", name) == pytest.approx(squashed(want)), name
        for name, values in {
            "quality": [0.2, 0.8, 0.5],
            "running": [0.5, 0.0, 0.0],
            "waiting": [0.0, 0.25, 0.0],
            "context": [(50 + 3 + 50 + 1) / 1024, 50 / 1024, 0.0],
            "drain": [(9 + 11) / 4 * full / (limit * 10), 12 / 4 * full / (limit * 10), 0.0],
        }.items():
            want = [squashed(value) for value in values]
            assert column(rows, "endpoint", name) == pytest.approx(want), name
        quality = squashed(np.array([0.2, 0.8, 0.5]))
        assert column(rows, "endpoint", "regret") == pytest.approx(quality[1] - quality)

    def test_of_those_there(self, seen):
        rows = encode(seen).running
        for name, want in {
            "quality": [0.6, 0.6],
            "limit": [1.0, 1.0],
            "used": [0.02 / (0.06 * 12)] * 2,
            "progress": [3 / 12, 1 / 12],
            "left": [9 / 256, 11 / 256],
            "prompt": [50 / 256] * 2,
        }.items():
            assert column(rows, "running", name) == pytest.approx(squashed(np.array(want))), name

    def test_of_the_request(self, seen):
        rows = encode(seen).request
        assert column(rows, "request", "prompt") == pytest.approx(squashed(100 / 256))
        assert column(rows, "request", "endpoints") == pytest.approx(squashed(3 / 8))
        assert column(rows, "request", "most quality") == pytest.approx(squashed(0.8))
        quality = squashed(np.array([0.2, 0.8, 0.5]))
        assert column(rows, "request", "mean quality") == pytest.approx(quality.mean())

    def test_analytic_terms_are_those_of_impact_greedy(self, seen):
        parameters = ImpactParameters(margin=1.1, softness=0.3, impact_weight=2.5)
        impact = expected_impact(seen, parameters)
        got = encode(seen, parameters=parameters)
        value = impact.own + 2.5 * impact.others
        want = np.stack([impact.in_time, impact.others, value], axis=1)
        assert got.analytic == pytest.approx(want, abs=1e-6)
        assert got.base == pytest.approx(value, abs=1e-6)
        assert encode(seen, impact, parameters=parameters).endpoint.tolist() == (
            got.endpoint.tolist()
        )

    def test_gauges_are_told_where_they_are_known(self, site, build):
        router, state = site
        state.set_load(B, EngineLoad(running=3, waiting=0, kv_usage=0.25), now_s=0.0)
        state.set_load(B, EngineLoad(running=3, waiting=0, kv_usage=0.25), now_s=0.0)
        rows = encode(router.observe(build.request(), now_s=0.02)).endpoint
        want = [0.0, squashed(0.25), 0.0]
        assert column(rows, "endpoint", "KV use") == pytest.approx(want)
        assert column(rows, "endpoint", "KV known") == pytest.approx([0.0, squashed(1.0), 0.0])
        assert column(rows, "endpoint", "foreign") == pytest.approx([0.0, squashed(0.5), 0.0])

    def test_names_are_unique_and_there_are_as_many_as_columns(self):
        assert len(FEATURES["endpoint"]) == 27
        assert set(graph.POOLED) == {
            "latency", "running", "waiting", "recent", "at stake", "in danger", "quality", "base",
        }  # fmt: skip
        for kind, names in graph.ANALYTIC_FEATURES.items():
            assert set(names) <= set(FEATURES[kind])


class TestEligibility:
    def test_what_cannot_be_chosen_changes_nothing_of_the_others(self, site, build):
        router, state = site
        request = build.request(arrival_s=0.02)
        state.set_ready(B, ready=False)
        without = encode(router.observe(request, now_s=0.02))
        for number in range(3):
            state.begin(f"more-{number}", B, build.admitted(quality=1.0))
        loaded = encode(router.observe(request, now_s=0.02))
        assert without.eligible.tolist() == [True, False, True]
        assert (without.request == loaded.request).all()
        assert (without.endpoint[[0, 2]] == loaded.endpoint[[0, 2]]).all()

    def test_none_can_be_chosen(self, site, build):
        router, state = site
        for address in (A, B, C):
            state.set_ready(address, ready=False)
        got = encode(router.observe(build.request(), now_s=0.02))
        assert np.isfinite(got.request).all()
        assert np.isfinite(got.endpoint).all()


EXTREMES = {
    "no limits": {"limit_s": float("inf")},
    "hardly any limit": {"limit_s": 1e9},
    "an impossible limit": {"limit_s": 1e-9, "first_token_limit_s": 1e-9},
    "a huge prompt": {"prompt_tokens": 10**9},
    "no prompt": {"prompt_tokens": 0},
    "long ago": {"arrival_s": -1e9},
}


@pytest.mark.parametrize("fields", EXTREMES.values(), ids=EXTREMES)
@pytest.mark.parametrize("resident", [{}, {"limit_s": 1e-9}, {"limit_s": float("inf")}])
def test_nothing_leaves_its_bounds(fields, resident, site, build):
    router, state = site
    odd = {"expected_output_tokens": 1e9, "prompt_tokens": 1e9, "quality": 1.0} | resident
    state.begin("odd", C, build.admitted(**odd))
    state.begin("old", C, build.admitted(arrival_s=-1e9, **resident))
    got = encode(router.observe(build.request(**fields), now_s=0.02))
    for rows in (got.request, got.endpoint, got.running, got.waiting):
        assert np.isfinite(rows).all()
        assert abs(rows).max() <= 2 * BOUND
    assert np.isfinite(got.analytic).all()


def test_order_of_candidates_does_not_matter(site, build):
    """Endpoints' rows move with them, the request's row stays."""
    seen = site[0].observe(build.request(), now_s=0.02)
    order = np.array([2, 0, 1])
    place = np.argsort(order)
    moved = {
        field.name: getattr(seen, field.name)[order]
        for field in dataclasses.fields(seen)
        if field.name in ("eligible", "quality", "output_tokens", "foreign", "kv_usage", "learned")
    }
    cost = type(seen.cost)(
        **{f.name: getattr(seen.cost, f.name)[order] for f in dataclasses.fields(seen.cost)}
    )
    where = place[seen.resident_candidate]
    got = encode(dataclasses.replace(seen, **moved, cost=cost, resident_candidate=where))
    want = encode(seen)
    assert got.endpoint == pytest.approx(want.endpoint[order])
    assert got.request == pytest.approx(want.request)
    assert got.running_endpoint.tolist() == place[want.running_endpoint].tolist()


class TestGroups:
    def test_pools_side_by_side_are_encoded_as_if_alone(self, site, build):
        """Three pools of one endpoint each."""
        router, state = site
        together = encode(router.observe(build.request(), now_s=0.02), groups=3)
        assert together.request.shape == (3, len(FEATURES["request"]))
        for number, (address, part) in enumerate(zip((A, B, C), together.split(), strict=True)):
            for other in (A, B, C):
                state.set_ready(other, ready=other == address)
            alone = encode(router.observe(build.request(), now_s=0.02))
            assert part.request == pytest.approx(alone.request)
            assert part.endpoint[0] == pytest.approx(alone.endpoint[number])
            assert part.analytic[0] == pytest.approx(alone.analytic[number])
            mine = alone.running_endpoint == number
            assert part.running == pytest.approx(alone.running[mine])
            assert part.running_endpoint.tolist() == [0] * int(mine.sum())

    def test_one_pool_is_not_taken_apart(self, seen):
        got = encode(seen)
        assert got.split() == [got]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_one_number_is_bounded_like_many(value):
    assert graph._squashed(value) == bounded(np.array([value]))[0]


def test_bounded_keeps_order_and_small_numbers():
    x = np.array([-1e300, -5.0, -0.01, 0.0, 0.01, 5.0, 1e300])
    got = bounded(x.copy())
    assert (np.diff(got) > 0).all()
    assert abs(got).max() <= BOUND
    assert got[4] == pytest.approx(0.01, rel=0.01)


def test_other_features_have_another_hash(monkeypatch):
    before = schema_hash()
    assert len(before) == 64
    assert schema_hash() == before
    monkeypatch.setattr(graph, "TOKENS", 128.0)
    assert schema_hash() != before


def test_the_documentation_names_every_feature():
    text = (Path(__file__).parents[3] / "docs" / "han-drl.md").read_text(encoding="utf-8")
    for names in FEATURES.values():
        for name, meaning in names.items():
            assert f"| {name} | {meaning} |" in text
