"""How good predictions of quality are, by what matters to routing.

All measures are of held-out prompts. *Chosen* is the mean actual score of the expert that is
predicted best, *regret* what the best expert of each prompt would have had above it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from scipy.stats import rankdata

from pointsman_core.state import FloatArray, IntArray
from pointsman_learning.evaluation.statistics import Interval, mean_intervals

RESAMPLES: Final = 2000
CALIBRATION_BINS: Final = 10
_TIE: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Judgement:
    """One method on one set of experts."""

    method: str
    chosen: Interval
    gain: Interval
    """Of chosen over the best single expert, paired by prompt."""
    regret: float
    brier: float | None
    """Mean squared error of the expected score; None: the method expects nothing."""
    calibration_error: float | None
    """Expected calibration error, over equally filled bins."""
    rank_correlation: float | None
    """Mean over prompts of Spearman's; experts that score alike share a rank."""
    microseconds: Mapping[int, float] = field(default_factory=dict)
    """Time per prompt by characters, where measured."""


def judge(
    method: str,
    predicted: FloatArray,
    scores: FloatArray,
    *,
    best_single: int,
    expects: bool = True,
    microseconds: Mapping[int, float] | None = None,
    seed: int = 0,
) -> Judgement:
    """Judge predictions of shape (P, X) by actual scores of the same shape, none missing.

    ``best_single`` is the expert that was best in training. Equal predictions share the
    choice. ``expects`` is False for rankings that are no expected scores.
    """
    got = chosen_score(predicted, scores)
    gain = got - scores[:, best_single]
    return Judgement(
        method=method,
        chosen=bootstrap(got, seed=seed),
        gain=bootstrap(gain, seed=seed),
        regret=float((scores.max(axis=1) - got).mean()),
        brier=float(((predicted - scores) ** 2).mean()) if expects else None,
        calibration_error=calibration_error(predicted, scores) if expects else None,
        rank_correlation=rank_correlation(predicted, scores),
        microseconds=microseconds or {},
    )


def chosen_score(predicted: FloatArray, scores: FloatArray) -> FloatArray:
    """(P,) score of the expert predicted best; the mean of those that are equally so."""
    best = predicted >= predicted.max(axis=1, keepdims=True) - _TIE
    score: FloatArray = (scores * best).sum(axis=1) / best.sum(axis=1)
    return score


def bootstrap(values: FloatArray, *, seed: int = 0) -> Interval:
    """Mean of (P,) values and its interval over prompts; equal seeds resample the same ones."""
    return mean_intervals(values[None, :], seed=seed, resamples=RESAMPLES)[0]


def calibration_error(predicted: FloatArray, scores: FloatArray) -> float:
    """Mean distance of expected from actual means, over bins of equally many predictions."""
    order = np.argsort(predicted, axis=None, kind="stable")
    expected, actual = predicted.ravel()[order], scores.ravel()[order]
    bins = np.array_split(np.arange(len(order)), CALIBRATION_BINS)
    apart = [abs(expected[b].mean() - actual[b].mean()) * len(b) for b in bins if len(b)]
    return float(sum(apart) / len(order))


def rank_correlation(predicted: FloatArray, scores: FloatArray) -> float | None:
    """Spearman's correlation per prompt, averaged where experts' scores differ."""
    told, real = rankdata(predicted, axis=1), rankdata(scores, axis=1)
    told -= told.mean(axis=1, keepdims=True)
    real -= real.mean(axis=1, keepdims=True)
    power = (told**2).sum(axis=1) * (real**2).sum(axis=1)
    differ = (real**2).sum(axis=1) > 0
    if not differ.any() or not (power > 0).any():
        return None
    together = (told * real).sum(axis=1)
    found = np.divide(together, np.sqrt(power), out=np.zeros_like(power), where=power > 0)
    return float(found[differ].mean())


# --- lengths ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LengthJudgement:
    """Error of predicted answer lengths against one constant per expert, cross-validated."""

    answers: int
    error: Interval
    """Mean absolute error of the logarithm."""
    constant_error: Interval
    """The same by the expert's median."""
    gain: Interval
    """Of the second over the first, paired by prompt."""


def judge_lengths(
    predicted: FloatArray, constant: FloatArray, tokens: FloatArray
) -> LengthJudgement:
    """Judge lengths of shape (P, X) by actual ones, NaN where unknown."""
    known = np.isfinite(tokens) & np.isfinite(predicted)
    rows = np.flatnonzero(known.any(axis=1))
    actual = np.log(np.where(known, tokens, 1.0))

    def error(expected: FloatArray) -> FloatArray:
        apart = np.abs(np.log(np.where(known, expected, 1.0)) - actual) * known
        mean: FloatArray = apart[rows].sum(axis=1) / known[rows].sum(axis=1)
        return mean

    told, usual = error(predicted), error(constant)
    return LengthJudgement(
        answers=int(known.sum()),
        error=bootstrap(told),
        constant_error=bootstrap(usual),
        gain=bootstrap(usual - told),
    )


def task_means(
    train_tasks: Sequence[str], train_scores: FloatArray, tasks: Sequence[str]
) -> FloatArray:
    """(P, X) mean training score of each prompt's true task, the overall one of a new task."""
    overall = np.nanmean(train_scores, axis=0)
    names = np.array(train_tasks, dtype=object)
    of: dict[str, FloatArray] = {
        name: np.nanmean(train_scores[names == name], axis=0) for name in set(train_tasks)
    }
    return np.array([of.get(task, overall) for task in tasks])


def columns_of(wanted: Sequence[str], experts: Sequence[str]) -> IntArray:
    """Columns of the wanted experts, in their order."""
    return np.array([list(experts).index(name) for name in wanted], np.int64)
