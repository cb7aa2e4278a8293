"""From a corpus to a predictor, and honest predictions for the corpus it is trained on."""

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np

from pointsman_core.predictors import Answers, Artefact, feature_matrix
from pointsman_core.predictors.features import SCHEMA, Float32Array
from pointsman_core.state import FloatArray, IntArray
from pointsman_learning.predictors.cache import cache_folder, write_whole
from pointsman_learning.predictors.export import export
from pointsman_learning.predictors.model import FitOptions, fit
from pointsman_learning.workloads import Corpus

Kind = Literal["ngram", "embedding", "combined"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Embed = Callable[[Sequence[str]], Float32Array]
"""(P, size) sentence embeddings of unit length."""

OPTIONS: Final[Mapping[Kind, FitOptions]] = {
    "ngram": FitOptions(difficulty_penalty=3.0),
    "embedding": FitOptions(use_ngrams=False, difficulty_penalty=10.0),
    "combined": FitOptions(difficulty_penalty=10.0),
}
FOLDS: Final = 5
_CACHE_FORMAT: Final = "1"


def train(
    corpus: Corpus,
    *,
    kind: Kind = "ngram",
    embed: Embed | None = None,
    seed: int = 0,
    options: FitOptions | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> bytes:
    """Fit to a corpus; returns the artefact as `pointsman_core.predictors.Artefact` reads it.

    Raises:
        ValueError: the corpus is too small, or ``kind`` needs embeddings and there are none.

    """
    embedding = None
    if kind != "ngram":
        if embed is None:
            raise ValueError(f"a predictor of kind {kind} needs sentence embeddings")
        embedding = embed(corpus.prompts)
    return _train(
        corpus,
        features=feature_matrix(corpus.prompts),
        embedding=embedding,
        kind=kind,
        seed=seed,
        options=options,
        metrics=metrics,
    )


def _train(
    corpus: Corpus,
    *,
    features: Float32Array,
    embedding: Float32Array | None,
    kind: Kind,
    seed: int,
    options: FitOptions | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> bytes:
    model = fit(
        features=features,
        embedding=embedding,
        scores=corpus.scores,
        output_tokens=corpus.output_tokens,
        tasks=corpus.tasks,
        experts=corpus.experts,
        options=options or OPTIONS[kind],
        seed=seed,
    )
    return export(model, provenance=_provenance(corpus, kind, seed), metrics=metrics)


def _provenance(corpus: Corpus, kind: Kind, seed: int) -> dict[str, Any]:
    return {
        "kind": kind,
        "data": corpus.source,
        "split": corpus.split,
        "prompts": len(corpus),
        "content": content_key(corpus),
        "seed": seed,
    }


def out_of_fold(
    corpus: Corpus,
    *,
    kind: Kind = "ngram",
    embed: Embed | None = None,
    folds: int = FOLDS,
    seed: int = 0,
    cache: bool = True,
) -> FloatArray:
    """(P, X) expected quality of each prompt by a predictor that was not trained on it.

    Folds are drawn by ``seed``. Cached on disk by content: the second call is quick.
    """
    return out_of_fold_answers(
        corpus, kind=kind, embed=embed, folds=folds, seed=seed, cache=cache
    ).quality


def out_of_fold_answers(
    corpus: Corpus,
    *,
    kind: Kind = "ngram",
    embed: Embed | None = None,
    folds: int = FOLDS,
    seed: int = 0,
    cache: bool = True,
) -> Answers:
    """All that predictors say of prompts that they were not trained on; see `out_of_fold`."""
    key = _key(corpus, f"{kind} {OPTIONS[kind]} {folds} {seed}")
    file = cache_folder() / f"out-of-fold-{key}.npz"
    found = _read(file, corpus) if cache else None
    if found is None:
        found = _by_fold(corpus, fold_of(len(corpus), folds=folds, seed=seed), kind, embed, seed)
        if cache:
            _write(file, found)
    return found


def leave_task_out(corpus: Corpus, *, kind: Kind = "ngram", embed: Embed | None = None) -> Answers:
    """Answers for each task by a predictor that saw none of its prompts: how it generalises."""
    _, task = np.unique(np.array(corpus.tasks, dtype=object), return_inverse=True)
    return _by_fold(corpus, task.astype(np.int64), kind, embed, 0)


def predict_matrix(
    artefact: Artefact, prompts: Sequence[str], embed: Embed | None = None
) -> FloatArray:
    """(P, X) expected quality, in the order of ``artefact.info.experts``."""
    embedding = None
    if artefact.info.embedding:
        if embed is None:
            raise ValueError(f"{artefact.source} needs sentence embeddings")
        embedding = embed(prompts)
    return artefact.predict(prompts, embedding).quality


def fold_of(prompts: int, *, folds: int, seed: int) -> IntArray:
    """(P,) fold of each prompt; folds differ in size by at most one."""
    shuffled: IntArray = np.random.default_rng(seed).permutation(prompts) % folds
    return shuffled


def _by_fold(corpus: Corpus, fold: IntArray, kind: Kind, embed: Embed | None, seed: int) -> Answers:
    features = feature_matrix(corpus.prompts)
    embedding = None if embed is None or kind == "ngram" else embed(corpus.prompts)
    shape = corpus.scores.shape
    said = Answers(*(np.full(shape, np.nan) for _ in range(3)))
    for one in range(int(fold.max()) + 1):
        held = fold == one
        content = _train(
            corpus.take(~held),
            features=features[~held],
            embedding=None if embedding is None else embedding[~held],
            kind=kind,
            seed=seed,
        )
        part = Artefact(content, source=f"the predictor without fold {one}").run(
            features[held], None if embedding is None else embedding[held]
        )
        said.quality[held] = part.quality
        said.uncertainty[held] = part.uncertainty
        said.output_tokens[held] = part.output_tokens
    return said


# --- cache -----------------------------------------------------------------------------


def content_key(corpus: Corpus) -> str:
    """Digest of prompts, tasks and scores: 16 hex digits."""
    digest = hashlib.sha256()
    for prompt, task in zip(corpus.prompts, corpus.tasks, strict=True):
        digest.update(f"{len(prompt)} {task} {prompt}\n".encode("utf-8", "replace"))
    digest.update("\n".join(corpus.experts).encode())
    for table in (corpus.scores, corpus.output_tokens):
        digest.update(np.ascontiguousarray(table, "<f8").tobytes())
    return digest.hexdigest()[:16]


def _key(corpus: Corpus, what: str) -> str:
    code = b"".join(
        (Path(__file__).parent / name).read_bytes() for name in ("model.py", "export.py")
    )
    text = f"{_CACHE_FORMAT} {SCHEMA} {content_key(corpus)} {what}".encode()
    return hashlib.sha256(text + code).hexdigest()[:16]


def _read(file: Path, corpus: Corpus) -> Answers | None:
    """What was cached; None when it is not there or is damaged."""
    try:
        with np.load(file, allow_pickle=False) as kept:
            said = Answers(kept["quality"], kept["uncertainty"], kept["output_tokens"])
    except (OSError, ValueError, KeyError, EOFError):
        return None
    return said if said.quality.shape == corpus.scores.shape else None


def _write(file: Path, said: Answers) -> None:
    """A cache that cannot be written is no reason to fail."""
    with contextlib.suppress(OSError):
        write_whole(
            file,
            lambda stream: np.savez_compressed(
                stream,
                quality=said.quality,
                uncertainty=said.uncertainty,
                output_tokens=said.output_tokens,
            ),
        )
