"""A fitted predictor as the ONNX artefact that core serves."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pointsman_core.predictors.artefact import ArtefactInfo
from pointsman_core.predictors.features import FEATURES
from pointsman_core.state import FloatArray, IntArray
from pointsman_learning.onnx_file import to_bytes
from pointsman_learning.predictors.model import GRAMS, Linear, Model

OPSET: Final = 17
IR_VERSION: Final = 9


def export(
    model: Model, *, provenance: Mapping[str, Any], metrics: Mapping[str, Any] | None = None
) -> bytes:
    """ONNX bytes; equal models and metadata give equal bytes.

    N-gram weights are stored at 16 bit: it halves the file and moves no prediction by more
    than a thousandth.
    """
    graph = _Graph()
    columns = graph.linear(model.linear, outputs=2 * len(model.kinds) + 1)
    logits, ease, length = graph.split(columns, (len(model.kinds), len(model.kinds), 1))
    kind = graph.node("Softmax", logits, axis=1)
    weighted = graph.node("Mul", kind, ease)
    _quality(graph, model, kind, weighted, ease)
    _output_tokens(graph, model, kind, length)
    info = ArtefactInfo(
        experts=model.experts,
        embedding=model.linear.embedding.shape[0],
        lengths=tuple(bool(known) for known in model.length_known),
        provenance=provenance,
        metrics=metrics or {},
    )
    return graph.build(info)


def _quality(graph: "_Graph", model: Model, kind: str, weighted: str, ease: str) -> None:
    """Mixture's mean, and its standard deviation with that of the means themselves."""
    mean, slope = model.mean, model.slope
    expected = graph.node(
        "Add",
        graph.node("MatMul", kind, graph.constant(mean)),
        graph.node("MatMul", weighted, graph.constant(slope)),
    )
    squares = [
        graph.node("MatMul", kind, graph.constant(mean**2)),
        graph.node("MatMul", weighted, graph.constant(2.0 * mean * slope)),
        graph.node("MatMul", graph.node("Mul", weighted, ease), graph.constant(slope**2)),
        graph.node("MatMul", graph.node("Mul", kind, kind), graph.constant(model.error**2)),
    ]
    power = graph.node("Sum", *squares)
    spread = graph.node("Sub", power, graph.node("Mul", expected, expected))
    zero, one = graph.constant(np.array(0.0)), graph.constant(np.array(1.0))
    graph.node("Sqrt", graph.node("Max", spread, zero), output="uncertainty")
    graph.node("Clip", expected, zero, one, output="quality")


def _output_tokens(graph: "_Graph", model: Model, kind: str, length: str) -> None:
    known = model.length_known
    mean = graph.node("MatMul", kind, graph.constant(model.log_length))
    told = graph.node("Exp", graph.node("Add", mean, length))
    factor = graph.constant(np.where(known, model.length_factor, np.nan)[None, :])
    one = graph.constant(np.array(1.0))
    graph.node("Max", graph.node("Mul", told, factor), one, output="output_tokens")


class _Graph:
    """Nodes and weights under construction; names are numbers in order of making."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._weights: list[Any] = []
        self._embedding = 0

    def constant(self, value: FloatArray | IntArray, dtype: type = np.float32) -> str:
        name = f"w{len(self._weights)}"
        self._weights.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def node(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:  # noqa: ANN401
        name = output or f"n{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def split(self, value: str, sizes: tuple[int, ...]) -> list[str]:
        names = [f"{value}.{part}" for part in range(len(sizes))]
        lengths = self.constant(np.array(sizes), np.int64)
        self._nodes.append(helper.make_node("Split", [value, lengths], names, axis=1))
        return names

    def linear(self, linear: Linear, *, outputs: int) -> str:
        """(P, outputs): n-grams, scaled to unit length, and the other inputs."""
        self._embedding = linear.embedding.shape[0]
        grams, shape = self.split("features", (GRAMS, FEATURES - GRAMS))
        parts = [self.node("MatMul", shape, self.constant(linear.shape))]
        if linear.gram_weights.any():
            # n-grams are 0 or 1, so their squared length is one more column of the product.
            table = np.hstack([linear.grams, linear.gram_weights[:, None] ** 2])
            weights = self.node("Cast", self.constant(table, np.float16), to=TensorProto.FLOAT)
            product, square = self.split(self.node("MatMul", grams, weights), (outputs, 1))
            least = self.constant(np.array(1e-6))
            size = self.node("Sqrt", self.node("Max", square, least))
            parts.append(self.node("Div", product, size))
        if self._embedding:
            parts.append(self.node("MatMul", "embedding", self.constant(linear.embedding)))
        return self.node("Sum", *parts, self.constant(linear.bias[None, :]))

    def build(self, info: ArtefactInfo) -> bytes:
        def tensor(name: str, columns: int) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["prompts", columns])

        inputs = [tensor("features", FEATURES)]
        if self._embedding:
            inputs.append(tensor("embedding", self._embedding))
        outputs = [
            tensor(name, len(info.experts)) for name in ("quality", "uncertainty", "output_tokens")
        ]
        graph = helper.make_graph(self._nodes, "predictor", inputs, outputs, self._weights)
        return to_bytes(graph, metadata=info.to_json(), opset=OPSET, ir_version=IR_VERSION)
