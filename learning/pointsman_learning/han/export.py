"""A trained network as the ONNX model that core serves.

The graph is written node by node, not traced: it has half as many nodes, and so takes half
the time, as what torch's exporter makes of `dense`. What does not change between decisions is
multiplied out (attention vectors into projections, both layers' projections of requests and
all heads' first layers into one product each), and sums over the requests of an endpoint are
scattered instead of multiplied by a table. Tests hold it to `dense` and to PyG.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from pointsman_core.deciders.han_drl import INPUTS, OUTPUTS, HanInfo
from pointsman_core.graph import FEATURES
from pointsman_core.state import FloatArray
from pointsman_learning.han.conv import SCORE_LIMIT, GraphHANConv
from pointsman_learning.han.estimator import EDGE
from pointsman_learning.han.graphs import RELATIONS
from pointsman_learning.han.model import HanNetwork, Head
from pointsman_learning.onnx_file import to_bytes

OPSET: Final = 20
IR_VERSION: Final = 10

_RUNNING, _WAITING, _TO_ENDPOINT, _TO_REQUEST = ("__".join(name) for name in RELATIONS)
_TINY = 1e-16


def export(
    network: HanNetwork,
    *,
    provenance: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
) -> bytes:
    """ONNX bytes; equal weights and metadata give equal bytes.

    ``provenance`` says what it was trained with, ``metrics`` how it did; both are plain JSON.
    """
    graph = _Graph()
    _Exporter(graph, network).write()
    info = HanInfo(
        impact=network.config.impact,
        config=network.config.to_dict(),
        provenance=provenance,
        metrics=metrics or {},
    )
    return graph.build(info)


class _Exporter:
    """Writes the network's nodes. Shapes as in `dense`, of one graph, R = R1 + R2."""

    def __init__(self, graph: "_Graph", network: HanNetwork) -> None:
        self.graph = graph
        self.network = network
        self.width = network.config.width
        self.heads = network.config.heads
        # (heads, width): spreads a number per head over that head's part of the width.
        self.spread = np.kron(np.eye(self.heads), np.ones((1, self.width // self.heads)))

    def write(self) -> None:
        g, network = self.graph, self.network
        h = {kind: self._embed(kind) for kind in ("request", "endpoint")}
        if network.config.use_han:
            self._links()
            residents = self._residents()
            for number, layer in enumerate(network.layers):
                new = self._layer(layer.conv, h, residents[2 * number : 2 * number + 2])
                for kind, norm in (("endpoint", layer.endpoint), ("request", layer.request)):
                    total = g.node("Add", h[kind], new[kind])
                    scale, bias = g.constant(_array(norm.weight)), g.constant(_array(norm.bias))
                    h[kind] = g.node("LayerNormalization", total, scale, bias, epsilon=norm.eps)
        self._heads(h)

    # --- input -------------------------------------------------------------------------

    def _embed(self, kind: str) -> str:
        weight, bias = _linear(self.network.inputs[kind])
        product = self.graph.gemm(kind, weight * self._keep(kind)[:, None], bias)
        return self.graph.node("Relu", product)

    def _keep(self, kind: str) -> FloatArray:
        if self.network.config.use_impact:
            return np.ones(len(FEATURES[kind]))
        return _array(self.network.get_buffer(f"keep_{kind}"))

    def _links(self) -> None:
        """Who is where: first the endpoints as places to run, then as places to wait."""
        g = self.graph
        number = g.node("Shape", "eligible")  # (1,)
        waits = g.node("Add", "waiting_endpoint", number)
        self.where = g.node("Concat", "running_endpoint", waits, axis=0)  # (R,)
        self.where_rows = g.unsqueeze(self.where, 1)  # (R, 1)
        places = g.node("Mul", number, g.constant(np.array([2]), np.int64))
        columns = g.constant(np.array([self.width + self.heads]), np.int64)
        shape = g.node("Concat", places, columns, axis=0)
        zero = numpy_helper.from_array(np.zeros(1, np.float32))
        self.nothing = g.node("ConstantOfShape", shape, value=zero)  # (2E, width + heads)
        self.eligible = g.node("Cast", g.unsqueeze("eligible", 0), to=TensorProto.FLOAT)  # (1, E)
        count = g.node("ReduceSum", self.eligible, keepdims=1)
        count = g.node("Max", count, g.constant(np.array([1.0])))
        self.share = g.node("Div", self.eligible, count)  # (1, E)
        self.two_rows = g.constant(np.array([2, -1]), np.int64)

    def _residents(self) -> list[str]:
        """(R, width + heads) message and a 1 per head, (R, heads) score; of each layer."""
        g = self.graph
        both = []
        for kind, relation in (("running", _RUNNING), ("waiting", _WAITING)):
            products = [self._message(layer.conv, kind, relation) for layer in self.network.layers]
            weight = np.hstack([w for product in products for w, _ in product])
            bias = np.hstack([b for product in products for _, b in product])
            both.append(g.gemm(self._embed(kind), weight, bias))
        sizes = (self.width + self.heads, self.heads) * len(self.network.layers)
        return g.split(g.node("Concat", *both, axis=0), sizes)

    def _message(
        self, conv: GraphHANConv, kind: str, relation: str
    ) -> list[tuple[FloatArray, FloatArray]]:
        """Weights and biases of message (and ones), and of the source's part of the score."""
        weight, bias = _linear(conv.proj[kind])
        ones = np.zeros((self.width, self.heads)), np.ones(self.heads)
        score = _scores(conv.lin_src[relation])
        return [
            (np.hstack([weight, ones[0]]), np.hstack([bias, ones[1]])),
            (weight @ score, bias @ score),
        ]

    # --- a layer -----------------------------------------------------------------------

    def _layer(self, conv: GraphHANConv, h: dict[str, str], resident: list[str]) -> dict[str, str]:
        g, d, heads = self.graph, self.width, self.heads
        weight, bias = _linear(conv.proj["endpoint"])
        runs, waits = (_scores(conv.lin_dst[name]) for name in (_RUNNING, _WAITING))
        columns = [*self._message(conv, "endpoint", _TO_REQUEST)]
        columns += [(weight @ runs, bias @ runs), (weight @ waits, bias @ waits)]
        product = g.gemm(h["endpoint"], *map(np.hstack, zip(*columns, strict=True)))
        message, score, runs_at, waits_at = g.split(product, (d + heads, heads, heads, heads))

        weight, bias = _linear(conv.proj["request"])
        to = _scores(conv.lin_dst[_TO_REQUEST])
        product = g.gemm(
            h["request"], np.hstack([weight, weight @ to]), np.hstack([bias, bias @ to])
        )
        told, asks = g.split(product, (d, heads))

        targets = g.node("Concat", runs_at, waits_at, axis=0)  # (2E, heads)
        at = g.node("Gather", targets, self.where, axis=0)  # (R, heads)
        weighted = self._weighted(conv, resident[0], resident[1], at)  # (R, d + heads)
        total = g.node("ScatterND", self.nothing, self.where_rows, weighted, reduction="add")
        present = self._mean(total)  # (2E, d)
        weighted = self._weighted(conv, message, score, asks)  # (E, d + heads)
        request = self._mean(g.node("MatMul", self.eligible, weighted))  # (1, d)
        return {
            "endpoint": self._weigh(conv, present, g.node("Relu", told)),
            "request": request,
        }

    def _weighted(self, conv: GraphHANConv, message: str, source: str, target: str) -> str:
        """(S, d + heads) messages times attention; they end with ones, so it with the weights."""
        g = self.graph
        score = g.node("LeakyRelu", g.node("Add", source, target), alpha=conv.negative_slope)
        limits = (g.constant(np.array(limit)) for limit in (-SCORE_LIMIT, SCORE_LIMIT))
        weight = g.node("Exp", g.node("Clip", score, *limits))
        every = g.constant(np.hstack([self.spread, np.eye(self.heads)]))
        return g.node("Mul", message, g.node("MatMul", weight, every))

    def _mean(self, total: str) -> str:
        """(T, d) of sums (T, d + heads) whose end is the sum of the weights."""
        g = self.graph
        sums, weights = g.split(total, (self.width, self.heads))
        below = g.gemm(weights, self.spread, np.full(self.width, _TINY))
        return g.node("Relu", g.node("Div", sums, below))

    def _weigh(self, conv: GraphHANConv, present: str, told: str) -> str:
        """(E, d) of (2E, d) what residents tell, and (1, d) what the request does."""
        g = self.graph
        query = g.constant(_array(conv.q).T)

        def score(value: str) -> str:
            keys = g.node("Tanh", g.gemm(value, *_linear(conv.k_lin)))
            return g.node("MatMul", keys, query)

        each = g.node("Reshape", score(present), self.two_rows)  # (2, E)
        mean = g.node("MatMul", self.share, g.node("Transpose", each, perm=[1, 0]))  # (1, 2)
        weights = g.node("Softmax", g.node("Concat", mean, score(told), axis=1), axis=1)
        of_present, of_told = g.split(weights, (2, 1))
        rows = g.node("Reshape", present, self.two_rows)  # (2, E d)
        mixed = g.node("MatMul", of_present, rows)
        mixed = g.node("Reshape", mixed, g.constant(np.array([-1, self.width]), np.int64))
        return g.node("Add", mixed, g.node("Mul", told, of_told))

    # --- heads -------------------------------------------------------------------------

    def _heads(self, h: dict[str, str]) -> None:
        g, network, config = self.graph, self.network, self.network.config
        chance, impact, base = g.split("analytic", (1, 1, 1))  # (E, 1)
        heads = [*network.twins, network.policy]
        size = config.hidden * len(heads)
        firsts = [head.first for head in heads]
        if network.estimator is not None:
            firsts.insert(0, network.estimator.first)
        d, told = self.width, 2 * self.width + len(FEATURES["endpoint"])
        weight = np.vstack([_array(first.weight)[:, :told] for first in firsts]).T
        bias = np.hstack([_array(first.bias) for first in firsts])
        keep = self._keep("endpoint")[:, None]
        own = np.vstack([weight[:d], weight[2 * d :] * keep])
        request = g.gemm(h["request"], weight[d : 2 * d], bias)  # (1, …)
        joined = g.node("Concat", h["endpoint"], "endpoint", axis=1)
        hidden = g.node("Add", g.node("MatMul", joined, g.constant(own)), request)
        if network.estimator is None:
            chance = g.node("Mul", chance, g.constant(np.array(0.0)))
            impact = g.node("Mul", impact, g.constant(np.array(0.0)))
        else:
            first, hidden = g.split(hidden, (config.hidden, size))
            chance, impact = self._estimate(first, chance, impact)
            estimates = g.node("Concat", chance, g.node("Tanh", impact), axis=1)
            more = np.vstack([_array(head.first.weight)[:, told:] for head in heads]).T
            hidden = g.node("Add", hidden, g.node("MatMul", estimates, g.constant(more)))
        actions = g.gemm(g.node("Relu", hidden), *_last(heads))  # (E, 2): q, logit

        rejects = [*network.reject_twins, network.reject_policy]
        weight = np.vstack([_array(head.first.weight) for head in rejects]).T
        weight[d:] *= self._keep("request")[:, None]
        bias = np.hstack([_array(head.first.bias) for head in rejects])
        joined = g.node("Concat", h["request"], "request", axis=1)
        reject = g.gemm(g.node("Relu", g.gemm(joined, weight, bias)), *_last(rejects))  # (1, 2)
        actions = g.node("Concat", actions, reject, axis=0)  # (E + 1, 2)
        if config.residual:
            least = g.constant(np.array([[config.impact.least_value]]))
            start = g.node("Concat", base, least, axis=0)  # (E + 1, 1)
            scale = np.array([[1.0, float(_array(network.sharpness))]])
            actions = g.node("Add", actions, g.node("MatMul", start, g.constant(scale)))
        value, logit = g.split(actions, (1, 1))
        self._answer(value, logit, chance, impact)

    def _estimate(self, first: str, chance: str, impact: str) -> tuple[str, str]:
        g, estimator = self.graph, self.network.estimator
        assert estimator is not None  # noqa: S101
        change = g.gemm(g.node("Relu", first), *_linear(estimator.last))  # (E, 2)
        by, more = g.split(change, (1, 1))
        count = g.constant(_array(self.network.get_buffer("present"))[:, None])
        more = g.node("Mul", more, g.node("Sign", g.node("MatMul", "endpoint", count)))
        edges = g.constant(np.array(EDGE)), g.constant(np.array(1.0 - EDGE))
        sure = g.node("Clip", chance, *edges)
        unsure = g.node("Sub", g.constant(np.array(1.0)), sure)
        logit = g.node("Log", g.node("Div", sure, unsure))
        return g.node("Sigmoid", g.node("Add", logit, by)), g.node("Add", impact, more)

    def _answer(self, value: str, logit: str, chance: str, impact: str) -> None:
        g = self.graph
        rejectable = g.constant(np.array([True]), np.bool_)
        valid = g.node("Concat", "eligible", rejectable, axis=0)  # (E + 1,)
        least = g.constant(np.array(-1e9))
        masked = g.node("Where", valid, g.squeeze(logit, 1), least)
        g.node("Softmax", masked, axis=0, output="probability")
        g.squeeze(value, 1, output="q")
        g.squeeze(chance, 1, output="chance")
        g.squeeze(impact, 1, output="impact")


def _array(tensor: Tensor) -> FloatArray:
    return tensor.detach().cpu().double().numpy()


def _linear(linear: nn.Module) -> tuple[FloatArray, FloatArray]:
    """(in, out) weights and (out,) biases; PyG's layers are not torch's."""
    return _array(linear.get_parameter("weight")).T, _array(linear.get_parameter("bias"))


def _scores(vector: Tensor) -> FloatArray:
    """(1, heads, size) to (heads x size, heads), so that x @ it is the score of each head."""
    _, heads, size = vector.shape
    return np.kron(np.eye(heads), np.ones((size, 1))) * _array(vector).reshape(-1, 1)


def _last(heads: list[Head]) -> tuple[FloatArray, FloatArray]:
    """(3 hidden, 2) last layers of twin values, taken together, and of the policy."""
    first, second, policy = (_linear(head.last) for head in heads)
    nothing = np.zeros_like(policy[0])
    value = np.vstack([0.5 * first[0], 0.5 * second[0], nothing])
    weight = np.hstack([value, np.vstack([nothing, nothing, policy[0]])])
    return weight, np.hstack([0.5 * (first[1] + second[1]), policy[1]])


class _Graph:
    """Nodes and weights under construction; names are numbers in order of making."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._weights: dict[bytes, Any] = {}

    def constant(self, value: FloatArray | Any, dtype: type = np.float32) -> str:  # noqa: ANN401
        """A weight; equal ones are stored once."""
        array = np.ascontiguousarray(value, dtype).reshape(np.shape(value))
        key = repr((array.dtype, array.shape)).encode() + array.tobytes()
        if key not in self._weights:
            self._weights[key] = numpy_helper.from_array(array, f"w{len(self._weights)}")
        name: str = self._weights[key].name
        return name

    def node(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:  # noqa: ANN401
        name = output or f"n{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def gemm(self, value: str, weight: NDArray[Any], bias: NDArray[Any]) -> str:
        return self.node("Gemm", value, self.constant(weight), self.constant(bias))

    def split(self, value: str, sizes: tuple[int, ...]) -> list[str]:
        names = [f"n{len(self._nodes)}.{part}" for part in range(len(sizes))]
        lengths = self.constant(np.array(sizes), np.int64)
        self._nodes.append(helper.make_node("Split", [value, lengths], names, axis=1))
        return names

    def squeeze(self, value: str, axis: int, output: str | None = None) -> str:
        return self.node("Squeeze", value, self.constant(np.array([axis]), np.int64), output=output)

    def unsqueeze(self, value: str, axis: int) -> str:
        return self.node("Unsqueeze", value, self.constant(np.array([axis]), np.int64))

    def build(self, info: HanInfo) -> bytes:
        kinds = {"float": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}

        def tensor(name: str, kind: str, shape: tuple[int | str, ...]) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, kinds[kind], shape)

        graph = helper.make_graph(
            self._nodes,
            "han",
            [tensor(name, *told) for name, told in INPUTS.items()],
            [tensor(name, *told) for name, told in OUTPUTS.items()],
            list(self._weights.values()),
        )
        return to_bytes(graph, metadata=info.to_json(), opset=OPSET, ir_version=IR_VERSION)
