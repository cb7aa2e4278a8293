"""How sure one can be of a mean, and of a difference between two deciders.

Windows (seeds) are resampled, never requests: requests of one window share its bursts, so
they are not independent. Deciders of one window met the very same requests, so differences
are taken window by window and resampled together (a paired bootstrap).

The plain percentile bootstrap is too narrow for few windows: by sqrt((n-1)/n), and because
it reads the normal instead of Student's distribution. Both are mended by widening the
percentiles as in Hesterberg, "What Teachers Should Know About the Bootstrap" (2015), section
3.3, "expanded percentile interval".

Windows may ask the same prompts: then the prompts' own chance cannot show in how windows
differ, and intervals over windows hold *given these prompts*. `over_prompts` widens them by
what the choice of prompts adds, as in two-way clustered standard errors (Cameron, Gelbach and
Miller, "Robust Inference With Multiway Clustering", 2011): variance by window, plus variance
by prompt, less that of the cells of both, which is in either.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from pointsman_core.state import FloatArray

RESAMPLES = 10_000
CONFIDENCE = 0.95
CONFIDENCE_Z = float(special.ndtri(0.5 + CONFIDENCE / 2))
"""Half the interval's width in standard errors, where there are many."""
MIN_WINDOWS = 5
"""Below this many windows there are no intervals: resampled means stay within the windows'
range, and the range of n windows covers the truth in no more than about 1 - 2^(1-n) of cases,
which is 88 % for four and 94 % for five."""
FEW_WINDOWS = 8
"""Below this many windows intervals are shown but not to be trusted. Ours."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its 95 % interval; NaN bounds with fewer than `MIN_WINDOWS`."""

    mean: float
    low: float
    high: float

    @property
    def clear_of_zero(self) -> bool:
        """Whether zero lies outside; False where the bounds are unknown."""
        return self.low > 0 or self.high < 0

    @property
    def half_width(self) -> float:
        """Half the interval's width, for tables; the bounds need not be symmetric."""
        return (self.high - self.low) / 2


def mean_intervals(
    values: FloatArray, *, seed: int = 0, resamples: int = RESAMPLES
) -> list[Interval]:
    """Intervals of the mean of each row.

    Args:
        values: (rows, windows); the same windows are drawn for all rows.
        seed: of the resampling; equal input gives equal intervals.
        resamples: how often the windows are drawn anew.

    """
    windows = values.shape[1]
    means = values.mean(axis=1)
    if windows < MIN_WINDOWS:
        return [Interval(float(mean), float("nan"), float("nan")) for mean in means]
    weights = _weights(windows, seed=seed, resamples=resamples)
    drawn = np.zeros((len(values), resamples))
    for value, weight in zip(values.T, weights, strict=True):
        # Not `values @ weights`: BLAS adds up in an order that depends on memory addresses.
        drawn += value[:, None] * weight
    low, high = np.quantile(drawn, _tails(windows), axis=1)
    # Rounding must not put the mean outside an interval of no width.
    low, high = np.minimum(low, means), np.maximum(high, means)
    ends = zip(means.tolist(), low.tolist(), high.tolist(), strict=True)
    return [Interval(*each) for each in ends]


def paired_differences(
    values: FloatArray, reference: FloatArray, *, seed: int = 0, resamples: int = RESAMPLES
) -> list[Interval]:
    """Intervals of the mean difference of each row to a reference.

    Args:
        values: (rows, windows).
        reference: (windows,) or (rows, windows), on the same windows in the same order.
        seed: of the resampling.
        resamples: how often the windows are drawn anew.

    """
    return mean_intervals(values - reference, seed=seed, resamples=resamples)


def over_prompts(
    intervals: Sequence[Interval], qos: FloatArray, requests: FloatArray
) -> list[Interval]:
    """Widen intervals over windows so that they hold for other prompts of the same kind too.

    Args:
        intervals: of R rows, over windows.
        qos: (R, W, P) sum of what was averaged, by window and prompt.
        requests: (W, P) how often each prompt was asked; each window equally often in all.

    """
    prompts = int((requests.sum(axis=0) > 0).sum())
    if prompts < 2:
        return list(intervals)
    extra = CONFIDENCE_Z * np.sqrt([_prompt_variance(row, requests) for row in qos])
    return [
        Interval(
            each.mean,
            each.mean - math.hypot(each.mean - each.low, more),
            each.mean + math.hypot(each.high - each.mean, more),
        )
        for each, more in zip(intervals, extra.tolist(), strict=True)
    ]


def _prompt_variance(qos: FloatArray, requests: FloatArray) -> float:
    """Variance of the mean by the choice of prompts, beyond that within windows; at least 0."""
    total = requests.sum()
    rest = qos - qos.sum() / total * requests  # (W, P)
    prompts = np.count_nonzero(requests.sum(axis=0))
    cells = np.count_nonzero(requests)
    by_prompt = (rest.sum(axis=0) ** 2).sum() * prompts / (prompts - 1)
    by_cell = (rest**2).sum() * cells / (cells - 1)
    return float(max(0.0, by_prompt - by_cell) / total**2)


def _weights(windows: int, *, seed: int, resamples: int) -> FloatArray:
    """(windows, resamples) share of each window in each resample."""
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(windows, np.full(windows, 1 / windows), size=resamples)
    weights: FloatArray = counts.T / windows
    return weights


def _tails(windows: int) -> tuple[float, float]:
    """Percentiles of the resampled means that bound the interval."""
    quantile = special.stdtrit(windows - 1, (1 - CONFIDENCE) / 2)
    tail = float(special.ndtr(np.sqrt(windows / (windows - 1)) * quantile))
    return tail, 1 - tail
