"""ONNX files of ours: checked, with what they tell of themselves; equal content, equal bytes."""

import onnx
from onnx import helper

from pointsman_core.onnx_session import METADATA_KEY


def to_bytes(graph: onnx.GraphProto, *, metadata: str, opset: int, ir_version: int) -> bytes:
    """Serialise a graph.

    Raises:
        onnx.checker.ValidationError: it is no valid model.

    """
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=ir_version,
        producer_name="pointsman",
    )
    helper.set_model_props(model, {METADATA_KEY: metadata})
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString(deterministic=True)
    return content
