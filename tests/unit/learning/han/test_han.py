"""The network: PyG against dense attention against ONNX Runtime, and what it must not do."""

import dataclasses

import numpy as np
import pytest
import torch

from pointsman_core.deciders import ImpactGreedy, ImpactParameters
from pointsman_core.deciders.han_drl import HanDrl, HanModel
from pointsman_core.graph import BOUND, FEATURES, GraphArrays, encode
from pointsman_learning.han import GraphStore, HanConfig, HanNetwork
from pointsman_learning.han.export import export
from pointsman_learning.han.graphs import only_eligible, to_hetero

ENDPOINTS = (1, 2, 16, 64)
REQUESTS = (0, 1, 7, 256)
CONFIGS = {
    "shipped": HanConfig(),
    "three layers": HanConfig(layers=3, width=16, heads=2),
    "without HAN": HanConfig(use_han=False),
    "without impact": HanConfig(use_impact=False, residual=False),
    "without base": HanConfig(residual=False),
    "without anything": HanConfig(use_han=False, use_impact=False, residual=False),
}


def random_graph(rng, endpoints, running, waiting, *, far=1.0):
    """Any graph; ``far`` of the way to the features' bounds, about a fifth not eligible."""

    def rows(count, kind):
        size = (count, len(FEATURES[kind]))
        return np.clip(rng.normal(size=size) * far, -BOUND, BOUND).astype(np.float32)

    eligible = rng.random(endpoints) < 0.8
    eligible[int(rng.integers(endpoints))] = True
    chance, others = rng.random(endpoints), -rng.exponential(size=endpoints)
    analytic = np.stack([chance, others, rng.random(endpoints) * chance + others], axis=1)
    return GraphArrays(
        request=rows(1, "request"),
        endpoint=rows(endpoints, "endpoint"),
        running=rows(running, "running"),
        waiting=rows(waiting, "waiting"),
        running_endpoint=rng.integers(0, endpoints, running),
        waiting_endpoint=rng.integers(0, endpoints, waiting),
        eligible=eligible,
        analytic=analytic.astype(np.float32),
    )


def random_graphs(seed=0, **options):
    rng = np.random.default_rng(seed)
    return [
        random_graph(rng, endpoints, running, waiting, **options)
        for endpoints in ENDPOINTS
        for running, waiting in zip(REQUESTS, (0, 7, 1, 64), strict=True)
    ]


def trained(config, seed=0):
    """A network whose last layers, at first zero, have weights too."""
    torch.manual_seed(seed)
    network = HanNetwork(config)
    for parameter in network.parameters():
        if parameter.ndim and not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.3)
    return network.eval()


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS)
def network(request):
    return trained(request.param)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


FIELDS = ("twin_q", "logits", "chance", "impact")


def picked(out, number, eligible):
    """What an output of a batch says of one graph's valid actions, as arrays."""
    where = np.flatnonzero(eligible)
    actions = np.append(where, out.valid.shape[-1] - 1)
    rows = {name: getattr(out, name)[..., number, :].numpy() for name in FIELDS}
    return {
        name: row[..., actions if name in ("twin_q", "logits") else where]
        for name, row in rows.items()
    }


class TestParity:
    def test_dense_attention_equals_pyg(self, network):
        graphs = random_graphs()
        dense = network(GraphStore.of(graphs).batch(range(len(graphs))))
        for number, (graph, oracle) in enumerate(
            zip(graphs, network.forward_pyg(to_hetero(graphs)), strict=True)
        ):
            got = picked(dense, number, graph.eligible)
            for name, want in picked(oracle, 0, np.ones(graph.eligible.sum())).items():
                np.testing.assert_allclose(got[name], want, atol=1e-5, rtol=1e-5, err_msg=name)

    def test_onnx_runtime_equals_dense_attention(self, network):
        served = HanModel(export(network, provenance={}))
        for graph in random_graphs(seed=1):
            out = network(GraphStore.of([graph]).batch([0]))
            got = served.run(graph)
            valid = out.valid[0].numpy()
            np.testing.assert_allclose(got.q[valid], out.q[0].numpy()[valid], atol=1e-5)
            np.testing.assert_allclose(got.probability, out.probability()[0], atol=1e-5)
            for name in ("chance", "impact"):
                want = getattr(out, name)[0].numpy()
                where = graph.eligible
                np.testing.assert_allclose(getattr(got, name)[where], want[where], atol=1e-5)

    def test_an_answer_does_not_depend_on_batch_mates(self, network):
        graphs = random_graphs(seed=2)
        store = GraphStore.of(graphs)
        together = network(store.batch(range(len(graphs))))
        for number, graph in enumerate(graphs):
            alone = picked(network(store.batch([number])), 0, graph.eligible)
            for name, got in picked(together, number, graph.eligible).items():
                np.testing.assert_allclose(got, alone[name], atol=1e-5, rtol=1e-5, err_msg=name)


class TestInvariance:
    def test_order_of_endpoints_does_not_matter(self, network):
        for graph in random_graphs(seed=3):
            order = np.random.default_rng(0).permutation(len(graph.endpoint))
            place = np.argsort(order)
            moved = dataclasses.replace(
                graph,
                endpoint=graph.endpoint[order],
                analytic=graph.analytic[order],
                eligible=graph.eligible[order],
                running_endpoint=place[graph.running_endpoint],
                waiting_endpoint=place[graph.waiting_endpoint],
            )
            both = network(GraphStore.of([graph, moved]).batch([0, 1]))
            actions = np.append(order, len(order))
            np.testing.assert_allclose(both.q[1], both.q[0][actions], atol=1e-5)
            np.testing.assert_allclose(both.logits[1], both.logits[0][actions], atol=2e-4)
            np.testing.assert_allclose(both.impact[1], both.impact[0][order], atol=1e-5)

    def test_order_of_requests_does_not_matter(self, network):
        graph = random_graph(np.random.default_rng(4), 5, 30, 9)
        order = np.random.default_rng(0).permutation(30)
        moved = dataclasses.replace(
            graph, running=graph.running[order], running_endpoint=graph.running_endpoint[order]
        )
        both = network(GraphStore.of([graph, moved]).batch([0, 1]))
        np.testing.assert_allclose(both.q[0], both.q[1], atol=1e-5)

    def test_endpoints_that_cannot_be_chosen_change_nothing(self, network):
        for graph in random_graphs(seed=5):
            both = network(GraphStore.of([graph, only_eligible(graph)]).batch([0, 1]))
            full = picked(both, 0, graph.eligible)
            for name, got in picked(both, 1, np.ones(graph.eligible.sum())).items():
                np.testing.assert_allclose(got, full[name], atol=1e-5, rtol=1e-5, err_msg=name)

    def test_features_left_out_do_not_matter(self):
        network = trained(CONFIGS["without impact"])
        graph = random_graph(np.random.default_rng(6), 4, 9, 3)
        column = list(FEATURES["endpoint"]).index("base")
        other = graph.endpoint.copy()
        other[:, column] = 0.0
        changed = dataclasses.replace(graph, endpoint=other, analytic=0.0 * graph.analytic)
        both = network(GraphStore.of([graph, changed]).batch([0, 1]))
        np.testing.assert_array_equal(both.q[0], both.q[1])


class TestNumbers:
    @pytest.mark.parametrize("far", [0.0, 1e3])
    def test_bounds_of_features_give_finite_answers(self, far, network):
        graphs = random_graphs(seed=7, far=far)
        out = network(GraphStore.of(graphs).batch(range(len(graphs))))
        assert all(torch.isfinite(getattr(out, name)).all() for name in FIELDS)
        assert torch.isfinite(out.probability()).all()

    def test_probabilities_are_of_valid_actions_and_sum_to_1(self, network):
        graphs = random_graphs(seed=8)
        out = network(GraphStore.of(graphs).batch(range(len(graphs))))
        for may_reject in (True, False):
            probability = out.probability(may_reject=may_reject)
            torch.testing.assert_close(probability.sum(-1), torch.ones(len(graphs)))
            assert (probability[~out.valid] == 0).all()
            assert may_reject or (probability[:, -1] == 0).all()

    def test_size(self):
        network = HanNetwork(HanConfig())
        assert sum(p.numel() for p in network.parameters()) < 150_000
        assert len(export(network, provenance={})) < 1_000_000


def test_nobody_there_nobody_harmed():
    """An endpoint without requests has no impact, whatever was learned."""
    network = trained(HanConfig())
    graph = random_graph(np.random.default_rng(4), 6, 5, 3)
    counts = [list(FEATURES["endpoint"]).index(name) for name in ("running", "waiting")]
    graph.endpoint[:, counts] = 0.0
    graph.endpoint[2:, counts[0]] = 0.1
    graph.analytic[:2, 1] = 0.0
    expected = network(GraphStore.of([graph]).batch([0])).impact[0].numpy()
    assert (expected[:2] == 0.0).all()
    assert (expected[2:] != graph.analytic[2:, 1]).all()
    served = HanModel(export(network, provenance={})).run(graph).impact
    assert (served[:2] == 0.0).all()
    np.testing.assert_allclose(served, expected, atol=1e-5)


class TestUntrained:
    """It is ImpactGreedy."""

    def test_values_and_policy(self):
        parameters = ImpactParameters(least_value=0.2)
        config = HanConfig(impact=parameters)
        graphs = random_graphs(seed=9)
        out = HanNetwork(config)(GraphStore.of(graphs).batch(range(len(graphs))))
        for number, graph in enumerate(graphs):
            start = np.append(graph.base, np.float32(0.2))
            got = picked(out, number, np.ones_like(graph.eligible))
            size = len(graph.base)
            assert (got["twin_q"][:, :size] == graph.base).all()
            np.testing.assert_allclose(out.q[number, -1], 0.2)
            np.testing.assert_allclose(got["logits"], config.sharpness * start, rtol=1e-6)
            np.testing.assert_allclose(got["chance"], graph.analytic[:, 0], atol=1e-3)
            np.testing.assert_allclose(got["impact"], graph.analytic[:, 1])

    def test_served_it_decides_the_same(self, build):
        addresses = [f"10.0.0.{i}:8000" for i in range(1, 6)]
        experts = [build.expert(f"e{i}", address) for i, address in enumerate(addresses)]
        router, state = build.router(*experts)
        rng = np.random.default_rng(0)
        for number in range(12):
            quality = float(rng.random())
            where = addresses[int(rng.integers(4))]
            state.begin(str(number), where, build.admitted(quality=quality, limit_s=0.02))
            state.add_tokens(str(number), int(rng.integers(0, 5)))
        seen = router.observe(build.request(limit_s=0.03), now_s=0.05)
        content = export(HanNetwork(HanConfig()), provenance={})
        got, want = HanDrl(HanModel(content)).score(seen), ImpactGreedy().score(seen)
        np.testing.assert_allclose(got.values, want.values, atol=1e-6)
        assert got.acceptable.tolist() == want.acceptable.tolist()
        assert encode(seen).base == pytest.approx(want.values, abs=1e-6)


class TestStore:
    def test_gives_back_what_was_put_in(self, tmp_path):
        graphs = random_graphs(seed=10)
        path = tmp_path / "graphs.npz"
        GraphStore.join([GraphStore.of(graphs[:5]), GraphStore.of(graphs[5:])]).save(path)
        store = GraphStore.load(path)
        assert len(store) == len(graphs)
        for number, graph in enumerate(graphs):
            for field in dataclasses.fields(graph):
                got = getattr(store.graph(number), field.name)
                np.testing.assert_array_equal(got, getattr(graph, field.name))

    def test_batches_in_the_order_asked_for(self):
        graphs = random_graphs(seed=11)
        batch = GraphStore.of(graphs).batch([9, 0, 9])
        assert len(batch) == 3
        np.testing.assert_array_equal(batch.request[1], graphs[0].request[0])
        np.testing.assert_array_equal(batch.endpoint[0, :16], graphs[9].endpoint)
        np.testing.assert_array_equal(batch.running_endpoint[2, :1], graphs[9].running_endpoint)
        assert (batch.running_endpoint[1] == -1).all()
        assert not batch.eligible[1, 1:].any()

    def test_no_graphs(self):
        with pytest.raises(ValueError, match="a store needs at least one graph"):
            GraphStore.of([])

    def test_other_features(self, tmp_path, monkeypatch):
        path = tmp_path / "graphs.npz"
        GraphStore.of(random_graphs()).save(path)
        monkeypatch.setattr("pointsman_core.graph.TOKENS", 100.0)
        with pytest.raises(ValueError, match=r"graphs.npz was written with other features"):
            GraphStore.load(path)

    def test_another_file(self, tmp_path):
        path = tmp_path / "other.npz"
        np.savez(path, a=np.zeros(3))
        with pytest.raises(ValueError, match=r"other.npz holds no graphs"):
            GraphStore.load(path)


class TestConfig:
    @pytest.mark.parametrize("wrong", [{"width": 30}, {"heads": 0}, {"layers": 0}, {"hidden": 0}])
    def test_sizes(self, wrong):
        with pytest.raises(ValueError, match="must be positive, width a multiple of heads"):
            HanConfig(**wrong)

    def test_no_base_without_impact(self):
        with pytest.raises(ValueError, match="without use_impact there is no base value"):
            HanConfig(use_impact=False)

    def test_survives_a_round_trip(self):
        config = HanConfig(width=16, impact=ImpactParameters(margin=1.7))
        assert HanConfig.from_dict(config.to_dict()) == config


class TestExport:
    def test_is_reproducible_and_says_what_it_is(self):
        network = trained(HanConfig(impact=ImpactParameters(margin=1.4)))
        content = export(network, provenance={"seed": 3}, metrics={"qos": 0.4})
        assert content == export(network, provenance={"seed": 3}, metrics={"qos": 0.4})
        info = HanModel(content).info
        assert info.impact == network.config.impact
        assert info.provenance == {"seed": 3}
        assert info.metrics == {"qos": 0.4}
        assert HanConfig.from_dict(dict(info.config)) == network.config


def test_gradients_reach_every_weight():
    network = trained(HanConfig()).train()
    with torch.enable_grad():
        out = network(GraphStore.of(random_graphs()).batch(range(16)))
        valid = out.valid[:, :-1]
        loss = (out.twin_q**2).mean() + out.probability().square().sum()
        loss = loss + (out.impact[valid] ** 2).mean() + (out.chance[valid] ** 2).mean()
        loss.backward()
    without = [
        name
        for name, weight in network.named_parameters()
        if weight.grad is None or not torch.isfinite(weight.grad).all()
    ]
    # One request tells every endpoint the same: nothing is weighed there.
    assert all("request__may_go_to__endpoint" in name for name in without), without
