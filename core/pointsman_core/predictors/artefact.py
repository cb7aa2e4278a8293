"""A trained predictor as bytes: an ONNX graph and what it says of itself.

The graph takes what `features` makes of prompts (and, for some, sentence embeddings) and
answers expected quality, how unsure that is, and the length of the answer. Its metadata names
the experts that its columns stand for, the layout of its features, and where it comes from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import orjson

from pointsman_core.onnx_session import METADATA_KEY, SessionError, open_session
from pointsman_core.predictors.features import FEATURES, SCHEMA, Float32Array, feature_matrix
from pointsman_core.state import FloatArray

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

FORMAT: Final = "pointsman-predictor/1"
MAX_BYTES: Final = 64 * 1024 * 1024
"""A larger file is no predictor: it is refused before anything parses it."""

BUILTIN: Final = "llmrouter-ngram.onnx"
_OUTPUTS: Final = ("quality", "uncertainty", "output_tokens")
_PROBES: Final = ("", "What is the capital of France?", "\x00\xff " * 3000)


class ArtefactError(ValueError):
    """Bytes that are no predictor this release can serve."""


@dataclass(frozen=True, slots=True)
class ArtefactInfo:
    """What an artefact says of itself."""

    experts: tuple[str, ...]
    """Model names, one per column."""
    embedding: int
    """Size of the sentence embedding that it needs; 0: none."""
    lengths: tuple[bool, ...]
    """Whether lengths of the expert's answers were learned, one per column."""
    provenance: Mapping[str, Any]
    """Data, split, seed and versions it was trained with."""
    metrics: Mapping[str, Any]
    """How it did on held-out prompts."""

    def to_json(self) -> str:
        """What `METADATA_KEY` holds."""
        body = {
            "format": FORMAT,
            "schema": SCHEMA,
            "experts": self.experts,
            "embedding": self.embedding,
            "lengths": self.lengths,
            "provenance": self.provenance,
            "metrics": self.metrics,
        }
        return orjson.dumps(body, option=orjson.OPT_SORT_KEYS).decode()


@dataclass(frozen=True, slots=True)
class Answers:
    """Of P prompts, for the X experts that an artefact knows."""

    quality: FloatArray
    """(P, X) expected score, in [0, 1]."""
    uncertainty: FloatArray
    """(P, X) standard deviation of that expectation; one answer's score varies far more."""
    output_tokens: FloatArray
    """(P, X) expected length; NaN where none was learned."""


class Artefact:
    """A loaded predictor; immutable, may be shared by policies.

    One thread computes, and none spins: it runs within one event loop.
    """

    def __init__(self, content: bytes, *, source: str = "predictor") -> None:
        """Load and try out.

        Raises:
            ArtefactError: it is corrupt, of another layout of features, or answers nonsense;
                says what is wrong with ``source``.

        """
        self.source = source
        self._session = _session(content, source)
        self.info = _info(self._session, source)
        self._check_shapes()
        self._try_out()

    def run(self, features: Float32Array, embedding: Float32Array | None = None) -> Answers:
        """Answer from inputs of shape (P, FEATURES) and, where needed, (P, info.embedding).

        Raises:
            ValueError: it needs an embedding and got none.

        """
        inputs = {"features": features}
        if self.info.embedding:
            if embedding is None:
                raise ValueError(f"{self.source} needs sentence embeddings of the prompts")
            inputs["embedding"] = embedding
        quality, uncertainty, tokens = self._session.run(_OUTPUTS, inputs)
        return Answers(
            quality=quality.astype(np.float64),
            uncertainty=uncertainty.astype(np.float64),
            output_tokens=tokens.astype(np.float64),
        )

    def predict(
        self, prompts: Sequence[str], embedding: Float32Array | None = None, *, batch: int = 256
    ) -> Answers:
        """Answer for P prompts; ``embedding`` of shape (P, info.embedding) where one is needed."""
        parts = [
            self.run(
                feature_matrix(prompts[start : start + batch]),
                None if embedding is None else embedding[start : start + batch],
            )
            for start in range(0, max(len(prompts), 1), batch)
        ]
        return Answers(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in _OUTPUTS)
        )

    def _check_shapes(self) -> None:
        wanted = {"features": FEATURES}
        if self.info.embedding:
            wanted["embedding"] = self.info.embedding
        got = {one.name: one.shape[-1] for one in self._session.get_inputs()}
        if got != wanted:
            raise ArtefactError(f"{self.source} takes {got}, not {wanted}")
        columns = {one.name: one.shape[-1] for one in self._session.get_outputs()}
        experts = len(self.info.experts)
        if columns != dict.fromkeys(_OUTPUTS, experts):
            raise ArtefactError(f"{self.source} names {experts} experts, but answers {columns}")

    def _try_out(self) -> None:
        """Weights that were damaged yet parse give themselves away by what they answer."""
        embedding = None
        if self.info.embedding:
            embedding = np.full((len(_PROBES), self.info.embedding), 0.05, np.float32)
        said = self.run(feature_matrix(_PROBES), embedding)
        bad = ~np.isfinite(said.quality) | (said.quality < 0) | (said.quality > 1)
        bad |= ~np.isfinite(said.uncertainty) | (said.uncertainty < 0)
        learned = np.array(self.info.lengths)
        bad[:, learned] |= ~(said.output_tokens[:, learned] >= 1.0)
        if bad.any():
            expert = self.info.experts[int(np.argwhere(bad)[0][1])]
            raise ArtefactError(f"{self.source} predicts nonsense of {expert}")


@lru_cache(maxsize=1)
def builtin_artefact() -> Artefact:
    """The predictor that is shipped with this release."""
    file = resources.files("pointsman_core.predictors") / "data" / BUILTIN
    return Artefact(file.read_bytes(), source="the built-in predictor")


def _session(content: bytes, source: str) -> "InferenceSession":
    if len(content) > MAX_BYTES:
        raise ArtefactError(f"{source} has {len(content)} bytes; at most {MAX_BYTES} are read")
    try:
        return open_session(content)
    except ModuleNotFoundError:
        raise ArtefactError(
            f"{source} needs ONNX Runtime: pip install 'pointsman[server]'"
        ) from None
    except SessionError as error:
        reason = str(error)[:200]
        raise ArtefactError(f"{source} is no ONNX file that can be run: {reason}") from error


def _info(session: "InferenceSession", source: str) -> ArtefactInfo:
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if text is None:
        raise ArtefactError(f"{source} is an ONNX file, but no predictor of quality")
    try:
        body = orjson.loads(text)
        found = body["format"], body["schema"]
        if found != (FORMAT, SCHEMA):
            raise ArtefactError(
                f"{source} was made for format {found[0]} with features {found[1]};"
                f" this release has {FORMAT} with {SCHEMA}: train it again"
            )
        info = ArtefactInfo(
            experts=tuple(body["experts"]),
            embedding=int(body["embedding"]),
            lengths=tuple(map(bool, body["lengths"])),
            provenance=body["provenance"],
            metrics=body["metrics"],
        )
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise ArtefactError(f"{source} has damaged metadata: {error}") from error
    if not info.experts or len(info.lengths) != len(info.experts):
        raise ArtefactError(f"{source} has damaged metadata: experts do not match lengths")
    return info
