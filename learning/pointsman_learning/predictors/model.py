"""Fitting the predictor of quality and output length.

Ours: a mixture over kinds of prompts. A linear classifier tells the kind (the corpus' own
tasks; clusters where it names none). Of each kind, an expert's mean score is shrunk towards
its overall mean (empirical Bayes), and one number per prompt, how hard it is among its kind,
moves all experts along slopes of their own. Measured here, no more than that can be learned of
which expert is best from a few thousand prompts: one regression per expert ranks them worse.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.special import logsumexp
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.linear_model import LogisticRegression

from pointsman_core.predictors.features import (
    BYTE_BUCKETS,
    FEATURES,
    WORD_BUCKETS,
    Float32Array,
)
from pointsman_core.state import BoolArray, FloatArray, IntArray

GRAMS: Final = WORD_BUCKETS + BYTE_BUCKETS
UNFAMILIAR: Final = "(unfamiliar)"
MIN_PROMPTS: Final = 20
"""With fewer nothing is learned."""
MIN_PER_CLUSTER: Final = 8
"""Mean size of clusters, at least."""


@dataclass(frozen=True, slots=True)
class FitOptions:
    """Chosen by cross-validation on the training split of LLMRouter's scores."""

    inverse_penalty: float = 30.0
    """C of the classifier of kinds."""
    shape_weight: float = 0.1
    """Scale of the shape features beside unit-length n-grams."""
    embedding_weight: float = 1.0
    """Scale of the embedding, which has unit length."""
    difficulty_penalty: float = 5.0
    """Ridge penalty of a prompt's difficulty within its kind."""
    length_penalty: float = 5.0
    """The same of the logarithm of its answers' length."""
    min_documents: int = 3
    """An n-gram bucket that fewer prompts have is ignored."""
    clusters: int = 12
    """Kinds made up where the corpus names none."""
    use_ngrams: bool = True
    """False: shape features and embedding only."""
    unfamiliar_margin: float = 3.0
    """Unfamiliar prompts are a kind of their own, of which only overall means are known.

    Its logit lies so far below what all kinds together have on nearly all training prompts:
    it wins where the classifier finds no kind likely.
    """


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """Linear maps of the inputs to C columns."""

    grams: FloatArray
    """(GRAMS, C) on unit-length weighted n-grams, the weights multiplied in."""
    gram_weights: FloatArray
    """(GRAMS,) inverse document frequencies."""
    shape: FloatArray
    """(SHAPE_FEATURES, C) on raw shape features."""
    embedding: FloatArray
    """(size of the embedding, C)"""
    bias: FloatArray
    """(C,)"""


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A fitted predictor of K kinds and X experts."""

    experts: tuple[str, ...]
    kinds: tuple[str, ...]
    linear: Linear
    """To 2 K + 1 columns: logits of the kinds, difficulty within each, logarithm of length."""
    mean: FloatArray
    """(K, X) expected score."""
    slope: FloatArray
    """(K, X) change of it with a prompt's difficulty."""
    error: FloatArray
    """(K, X) standard error of the mean."""
    log_length: FloatArray
    """(K, X) expected logarithm of the answer's length; 0 where unknown."""
    length_known: BoolArray
    """(X,)"""
    length_factor: FloatArray
    """(X,) mean of exp(residual): from the mean logarithm to the mean length (Duan, 1983)."""
    notes: dict[str, Any] = field(default_factory=dict)


def fit(
    *,
    features: Float32Array,
    embedding: Float32Array | None,
    scores: FloatArray,
    output_tokens: FloatArray | None,
    tasks: Sequence[str],
    experts: Sequence[str],
    options: FitOptions | None = None,
    seed: int = 0,
) -> Model:
    """Fit to P prompts; scores and lengths are (P, X) and NaN where unknown.

    Raises:
        ValueError: fewer than `MIN_PROMPTS` prompts have scores, or an expert has none.

    """
    chosen = options or FitOptions()
    _check(scores, experts)
    space = _Space.of(features, embedding, chosen)
    inputs = space.inputs(features, embedding)
    kinds, kind = _kinds(inputs, tasks, clusters=chosen.clusters, seed=seed)
    logits = _classifier(inputs, kind, len(kinds), chosen)
    mean, error = _shrunk_means(scores, kind, len(kinds))
    difficulty, slope = _difficulty(inputs, scores - mean[kind], kind, len(kinds), chosen)
    lengths = _lengths(inputs, output_tokens, kind, scores.shape[1], len(kinds), chosen)
    kinds, logits, difficulty = _with_unfamiliar(kinds, inputs, logits, difficulty, chosen)
    columns = np.hstack([logits.weights, difficulty.weights, lengths.weights])
    biases = np.concatenate([logits.bias, difficulty.bias, lengths.bias])
    return Model(
        experts=tuple(experts),
        kinds=kinds,
        linear=space.unscaled(columns, biases),
        mean=np.vstack([mean, np.nanmean(scores, axis=0)]),
        slope=np.vstack([slope, np.ones(scores.shape[1])]),
        error=np.vstack([error, mean.std(axis=0)]),
        log_length=np.vstack([lengths.log_length, lengths.usual]),
        length_known=lengths.known,
        length_factor=lengths.factor,
    )


def _check(scores: FloatArray, experts: Sequence[str]) -> None:
    known = np.isfinite(scores)
    if known.any(axis=1).sum() < MIN_PROMPTS:
        raise ValueError(
            f"only {int(known.any(axis=1).sum())} prompts have scores, needs {MIN_PROMPTS}"
        )
    for column, name in enumerate(experts):
        if not known[:, column].any():
            raise ValueError(f"{name} has no scores to learn from")


# --- inputs ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Space:
    """How inputs are scaled for fitting, and weights scaled back for serving."""

    gram_weights: FloatArray
    shape_mean: FloatArray
    shape_scale: FloatArray
    """Of raw shape features: fitted on (shape - mean) x scale."""
    embedding: int
    embedding_weight: float

    @classmethod
    def of(
        cls, features: Float32Array, embedding: Float32Array | None, options: FitOptions
    ) -> "_Space":
        documents = (features[:, :GRAMS] > 0).sum(axis=0)
        weights = np.log((1.0 + len(features)) / (1.0 + documents))
        weights[documents < options.min_documents] = 0.0
        shape = features[:, GRAMS:].astype(np.float64)
        return cls(
            gram_weights=weights if options.use_ngrams else np.zeros(GRAMS),
            shape_mean=shape.mean(axis=0),
            shape_scale=options.shape_weight / (shape.std(axis=0) + 1e-2),
            embedding=0 if embedding is None else embedding.shape[1],
            embedding_weight=options.embedding_weight,
        )

    def inputs(self, features: Float32Array, embedding: Float32Array | None) -> sp.csr_matrix:
        """(P, FEATURES + size of the embedding), scaled for fitting."""
        grams = sp.csr_matrix(features[:, :GRAMS]).multiply(self.gram_weights).tocsr()
        size = np.sqrt(np.asarray(grams.multiply(grams).sum(axis=1)).ravel())
        grams = sp.diags(1.0 / np.maximum(size, 1e-6)) @ grams
        shape = (features[:, GRAMS:] - self.shape_mean) * self.shape_scale
        parts = [grams, sp.csr_matrix(shape)]
        if embedding is not None:
            parts.append(sp.csr_matrix(embedding * self.embedding_weight))
        return sp.hstack(parts).tocsr()

    def unscaled(self, weights: FloatArray, bias: FloatArray) -> Linear:
        shape = weights[GRAMS:FEATURES] * self.shape_scale[:, None]
        return Linear(
            grams=weights[:GRAMS] * self.gram_weights[:, None],
            gram_weights=self.gram_weights,
            shape=shape,
            embedding=weights[FEATURES:] * self.embedding_weight,
            bias=bias - self.shape_mean @ shape,
        )


# --- kinds -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Columns:
    weights: FloatArray
    bias: FloatArray


def _kinds(
    inputs: sp.csr_matrix, tasks: Sequence[str], *, clusters: int, seed: int
) -> tuple[tuple[str, ...], IntArray]:
    """Names of the kinds, and each prompt's."""
    named = sorted({task for task in tasks if task})
    if named and all(tasks):
        number = {name: index for index, name in enumerate(named)}
        return tuple(named), np.array([number[task] for task in tasks], np.int64)
    count = max(1, min(clusters, inputs.shape[0] // MIN_PER_CLUSTER))
    size = min(48, inputs.shape[0] - 1)
    flat = TruncatedSVD(size, random_state=seed).fit_transform(inputs)
    found = KMeans(count, n_init=4, random_state=seed).fit_predict(flat)
    present, kind = np.unique(found, return_inverse=True)
    return tuple(f"cluster {one}" for one in present), kind.astype(np.int64)


def _classifier(inputs: sp.csr_matrix, kind: IntArray, kinds: int, options: FitOptions) -> _Columns:
    if kinds == 1:
        return _Columns(np.zeros((inputs.shape[1], 1)), np.zeros(1))
    model = LogisticRegression(C=options.inverse_penalty, max_iter=300, tol=1e-3)
    model.fit(inputs, kind)
    weights, bias = model.coef_.T, model.intercept_
    if kinds == 2:  # one column there: the second's against the first's
        weights = np.hstack([np.zeros_like(weights), weights])
        bias = np.concatenate([[0.0], bias])
    return _Columns(weights, bias)


def _with_unfamiliar(
    kinds: tuple[str, ...],
    inputs: sp.csr_matrix,
    logits: _Columns,
    difficulty: _Columns,
    options: FitOptions,
) -> tuple[tuple[str, ...], _Columns, _Columns]:
    """Add the kind of unfamiliar prompts: a constant logit, and no difficulty."""
    nothing = np.zeros((len(logits.weights), 1))
    together = logsumexp(inputs @ logits.weights + logits.bias, axis=1)
    logit = float(np.percentile(together, 1)) - options.unfamiliar_margin
    return (
        (*kinds, UNFAMILIAR),
        _Columns(np.hstack([logits.weights, nothing]), np.append(logits.bias, logit)),
        _Columns(np.hstack([difficulty.weights, nothing]), np.append(difficulty.bias, 0.0)),
    )


def _shrunk_means(scores: FloatArray, kind: IntArray, kinds: int) -> tuple[FloatArray, FloatArray]:
    """(K, X) means by kind, shrunk by how far kinds differ, and their standard errors."""
    overall = np.nanmean(scores, axis=0)
    count = np.zeros((kinds, scores.shape[1]))
    total, within = count.copy(), np.nanvar(scores, axis=0)
    for one in range(kinds):
        rows = scores[kind == one]
        count[one] = np.isfinite(rows).sum(axis=0)
        total[one] = np.nansum(rows, axis=0)
    raw = np.divide(total, count, out=np.tile(overall, (kinds, 1)), where=count > 0)
    # Moments: the spread of raw means is that of kinds and that of sampling.
    noise = within / np.maximum(count, 1.0)
    between = np.maximum((raw - overall) ** 2 - noise, 0.0).mean(axis=0) + 1e-4
    trust = between / (between + noise)
    mean = overall + trust * (raw - overall)
    error: FloatArray = np.sqrt(trust * noise)
    return mean, error


def _difficulty(
    inputs: sp.csr_matrix, residual: FloatArray, kind: IntArray, kinds: int, options: FitOptions
) -> tuple[_Columns, FloatArray]:
    """How much better than its kind's mean a prompt is answered, and each expert's slope."""
    ease = np.nan_to_num(np.nanmean(_some(residual), axis=1))
    weights, slope = np.zeros((inputs.shape[1], kinds)), np.ones((kinds, residual.shape[1]))
    for one in range(kinds):
        rows = np.flatnonzero(kind == one)
        if len(rows) >= MIN_PROMPTS:
            weights[:, one] = _ridge(inputs[rows], ease[rows], options.difficulty_penalty)
            slope[one] = _slope(residual[rows], ease[rows])
    centre = np.array([-_mean_of(inputs, kind == k) @ weights[:, k] for k in range(kinds)])
    return _Columns(weights, centre), slope


def _some(values: FloatArray) -> FloatArray:
    """Rows without any value become zeros, so that their mean is one."""
    return np.where(np.isfinite(values).any(axis=1, keepdims=True), values, 0.0)


def _slope(residual: FloatArray, ease: FloatArray) -> FloatArray:
    known = np.isfinite(residual)
    power = (known * ease[:, None] ** 2).sum(axis=0)
    together = (np.nan_to_num(residual) * ease[:, None]).sum(axis=0)
    prior = 5.0 * float(np.mean(ease**2)) + 1e-9  # as if five prompts had shown a slope of 1
    slope: FloatArray = (together + prior) / (power + prior)
    return slope


def _ridge(inputs: sp.csr_matrix, target: FloatArray, penalty: float) -> FloatArray:
    """Weights on centred inputs, solved over prompts as there are fewer of them."""
    mean = np.asarray(inputs.mean(axis=0)).ravel()
    products = (inputs @ inputs.T).toarray()
    cross = inputs @ mean
    products += mean @ mean - cross[:, None] - cross[None, :]
    products[np.diag_indices_from(products)] += penalty
    dual = np.linalg.solve(products, target - target.mean())
    weights: FloatArray = inputs.T @ dual - mean * dual.sum()
    return weights


def _mean_of(inputs: sp.csr_matrix, rows: NDArray[np.bool_]) -> FloatArray:
    return np.asarray(inputs[np.flatnonzero(rows)].mean(axis=0)).ravel()


# --- lengths ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Lengths(_Columns):
    log_length: FloatArray
    usual: FloatArray
    """(X,) the overall mean of that."""
    known: BoolArray
    factor: FloatArray


def _lengths(
    inputs: sp.csr_matrix,
    output_tokens: FloatArray | None,
    kind: IntArray,
    experts: int,
    kinds: int,
    options: FitOptions,
) -> _Lengths:
    """Logarithm of the length: means by kind, and one number per prompt for all experts."""
    weights, bias = np.zeros((inputs.shape[1], 1)), np.zeros(1)
    flat, factor, usual = np.zeros((kinds, experts)), np.ones(experts), np.zeros(experts)
    if output_tokens is None:
        return _Lengths(weights, bias, flat, usual, np.zeros(experts, np.bool_), factor)
    logs = np.log(np.maximum(output_tokens, 1.0))
    known: BoolArray = np.isfinite(logs).sum(axis=0) >= MIN_PROMPTS
    if not known.any():
        return _Lengths(weights, bias, flat, usual, known, factor)
    flat[:, known] = _shrunk_means(logs[:, known], kind, kinds)[0]
    usual[known] = np.nanmean(logs[:, known], axis=0)
    residual = logs[:, known] - flat[kind][:, known]
    rows = np.flatnonzero(np.isfinite(residual).any(axis=1))
    shared = np.nanmean(residual[rows], axis=1)
    weights[:, 0] = _ridge(inputs[rows], shared, options.length_penalty)
    bias[0] = float(shared.mean() - np.asarray(inputs[rows].mean(axis=0)).ravel() @ weights[:, 0])
    told = (inputs @ weights[:, 0] + bias[0])[:, None]
    factor[known] = np.nanmean(np.exp(residual - told), axis=0)
    return _Lengths(weights, bias, flat, usual, known, factor)
