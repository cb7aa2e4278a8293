"""Fitting `CostModel`'s four times to measured iterations.

Non-negative robust least squares of relative errors (scipy's trust region reflective
method with a soft L1 loss) from several starts, since the roofline has a kink. How good
the fit is, is told by 5-fold cross-validation: each row is predicted by a fit without it.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares, nnls

from pointsman_core.cost import CostModel
from pointsman_learning.calibration.measurements import (
    MIN_ROWS,
    CalibrationError,
    FloatArray,
    Measurements,
)

FOLDS = 5
SOFT_ERROR = 0.1
"""Relative errors well above this one count linearly, as outliers. Ours."""
SPLITS = (0.05, 0.5, 0.95)
"""Starts: shares of an iteration's constant time that are overhead, not weights."""
_NEAR_BOUND = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """The times of `CostModel`, in seconds."""

    overhead_s: float
    compute_s_per_token: float
    weights_s: float
    context_s_per_token: float

    def predict(self, rows: Measurements) -> FloatArray:
        """(rows,) seconds of each row's iteration, as `CostModel.iteration_seconds`."""
        compute = self.compute_s_per_token * rows.tokens
        result: FloatArray = self.overhead_s + np.maximum(compute, self.memory_s(rows))
        return result

    def memory_s(self, rows: Measurements) -> FloatArray:
        """(rows,) the part of an iteration that is memory traffic."""
        result: FloatArray = self.weights_s + self.context_s_per_token * rows.context_tokens
        return result

    def cost_model(
        self, *, kv_capacity_tokens: int, max_sequences: int, max_batched_tokens: int
    ) -> CostModel:
        """The cost model of an engine with these limits."""
        return CostModel(
            overhead_s=self.overhead_s,
            compute_s_per_token=self.compute_s_per_token,
            weights_s=self.weights_s,
            context_s_per_token=self.context_s_per_token,
            kv_capacity_tokens=kv_capacity_tokens,
            max_sequences=max_sequences,
            max_batched_tokens=max_batched_tokens,
        )


@dataclass(frozen=True, slots=True)
class Errors:
    """How far predictions are from measurements; shares of the measured time."""

    r2: float
    mape: float
    """Mean absolute percentage error, as a share."""
    p90: float
    worst: float
    worst_row: int
    """From 0."""

    @classmethod
    def of(cls, predicted: FloatArray, measured: FloatArray) -> "Errors":
        """Compare (rows,) with (rows,)."""
        error = np.abs(predicted - measured) / measured
        spread = float(((measured - measured.mean()) ** 2).sum())
        left = float(((predicted - measured) ** 2).sum())
        return cls(
            r2=1.0 - left / spread if spread > 0 else float("nan"),
            mape=float(error.mean()),
            p90=float(np.quantile(error, 0.9)),
            worst=float(error.max()),
            worst_row=int(error.argmax()),
        )


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted cost model and how much to trust it."""

    times: Times
    held_out: Errors
    """Each row predicted by a fit without it."""
    fitted: Errors
    """All rows, by the fit to all of them."""
    warnings: tuple[str, ...]
    """What the measurements could not tell."""


def fit(rows: Measurements, *, seed: int = 0) -> Fit:
    """Fit the cost model's times to measured iterations.

    Raises `CalibrationError` for fewer than `MIN_ROWS` rows.
    """
    if len(rows) < MIN_ROWS:
        raise CalibrationError(f"needs at least {MIN_ROWS} measurements (got {len(rows)})")
    times = _solve(rows)
    held_out = np.empty(len(rows))
    fold = np.random.default_rng(seed).permutation(len(rows)) % FOLDS
    for number in range(FOLDS):
        held_out[fold == number] = _solve(rows[fold != number]).predict(rows[fold == number])
    times, warnings = _bound(times, rows)
    return Fit(
        times=times,
        held_out=Errors.of(held_out, rows.iteration_seconds),
        fitted=Errors.of(times.predict(rows), rows.iteration_seconds),
        warnings=warnings,
    )


def _solve(rows: Measurements) -> Times:
    constant, compute, context = _additive(rows)
    scale = np.array([constant, compute, constant, context])
    measured = rows.iteration_seconds

    def errors(unknown: FloatArray) -> FloatArray:
        result: FloatArray = _times(unknown * scale).predict(rows) / measured - 1.0
        return result

    starts = [np.array([share, 1.0, 1.0 - share, 1.0]) for share in SPLITS]
    found = [
        least_squares(errors, start, bounds=(0.0, np.inf), loss="soft_l1", f_scale=SOFT_ERROR)
        for start in starts
    ]
    return _times(min(found, key=lambda each: float(each.cost)).x * scale)


def _additive(rows: Measurements) -> tuple[float, float, float]:
    """Start and scale: the best sum of constant, tokens and context, none of them 0."""
    columns = np.stack([np.ones(len(rows)), rows.tokens, rows.context_tokens], axis=1)
    solution, _ = nnls(columns / rows.iteration_seconds[:, None], np.ones(len(rows)))
    mean = float(rows.iteration_seconds.mean())
    floor = mean * _NEAR_BOUND / np.maximum(columns.mean(axis=0), 1.0)
    constant, compute, context = np.maximum(solution, floor)
    return float(constant), float(compute), float(context)


def _times(values: FloatArray) -> Times:
    overhead, compute, weights, context = map(float, values)
    return Times(
        overhead_s=overhead,
        compute_s_per_token=compute,
        weights_s=weights,
        context_s_per_token=context,
    )


def _bound(times: Times, rows: Measurements) -> tuple[Times, tuple[str, ...]]:
    """Say what no row could tell; an unseen arithmetic gets its largest possible value."""
    warnings = []
    memory = times.memory_s(rows)
    if not (times.compute_s_per_token * rows.tokens > memory).any():
        bound = float((memory / rows.tokens).min())
        times = Times(
            overhead_s=times.overhead_s,
            compute_s_per_token=bound,
            weights_s=times.weights_s,
            context_s_per_token=times.context_s_per_token,
        )
        warnings.append(
            "no measured iteration was bound by arithmetic: perTokenUs is an upper bound, "
            "measure iterations with more prompt tokens"
        )
    if times.context_s_per_token * rows.context_tokens.max() < _NEAR_BOUND * memory.max():
        warnings.append("the context made no difference: measure longer prompts")
    return times, tuple(warnings)
