"""Parameters of the heuristic deciders, tuned on training windows.

Every decider with something to tune gets the same treatment: random search with successive
halving on the same windows, then a local search round the best. The score is the mean
average QoS over sites, workloads, loads, limits and admission rules: half of the windows are
the edge site's, the others have a random pool each, lest a margin fit one site only. Test
prompts and the traces' test windows are never touched, and quality predictions are out of
fold.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

import numpy as np

from pointsman_common.wording import counted
from pointsman_core.deciders import (
    ADMISSION_MARGINS,
    Decider,
    ImpactGreedy,
    ImpactParameters,
    LatencyQualityGreedy,
    Scores,
    ScoreWeights,
    WeightedScore,
    make_decider,
)
from pointsman_core.latency import forecast
from pointsman_core.observation import Observation
from pointsman_core.resources import Admission, Algorithm
from pointsman_core.snapshot import Snapshot
from pointsman_core.state import FloatArray
from pointsman_learning.evaluation.composer import PRIORS, default_predictor
from pointsman_learning.simulator import simulate
from pointsman_learning.simulator.scenario import Scenario
from pointsman_learning.workloads import (
    SMALL_SHARE,
    Corpus,
    Pool,
    default_corpus,
    edge_site,
    make_scenario,
    random_pool,
)

WORKLOADS = ("poisson", "on-off", "azure-conv", "azure-code")
LOADS = (0.3, 0.5, 0.7, 0.9, 1.1, 1.4)
LIMITS = ("x1", "x2.5", "x5")
EDGE_SITE, RANDOM_POOL = SITES = ("edge site", "random pool")
POOL = 78
"""Keeps the draw of a pool apart from those within its scenario."""

Values = Mapping[str, float]
"""Parameters by name."""


@dataclass(frozen=True, slots=True)
class Range:
    """Where a parameter is looked for."""

    low: float
    high: float
    logarithmic: bool = False

    def at(self, share: float) -> float:
        """The value at that share of the way from ``low`` to ``high``."""
        share = min(max(share, 0.0), 1.0)
        if self.logarithmic:
            return self.low * math.exp(share * math.log(self.high / self.low))
        return self.low + share * (self.high - self.low)

    def share(self, value: float) -> float:
        """The inverse of `at`, within [0, 1]."""
        if self.logarithmic:
            found = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            found = (value - self.low) / (self.high - self.low)
        return min(max(found, 0.0), 1.0)


@dataclass(frozen=True, slots=True)
class Space:
    """What is tuned of one decider."""

    algorithm: Algorithm
    make: Callable[[Values, np.random.Generator], Decider]
    ranges: Mapping[str, Range]
    start: Values
    """Tried first."""
    admissions: tuple[Admission, ...] = (Admission.REJECT, Admission.BEST_EFFORT)
    """Rules under which the parameters make a difference."""

    def values(self, shares: Sequence[float]) -> Values:
        """Parameters at these shares of their ranges, rounded to four digits."""
        pairs = zip(self.ranges.items(), shares, strict=True)
        return {name: _rounded(found.at(share)) for (name, found), share in pairs}

    def shares(self, values: Values) -> list[float]:
        """The inverse of `values`."""
        return [found.share(values[name]) for name, found in self.ranges.items()]


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


class WithMargin:
    """A decider with its own margin in the common check of admission."""

    def __init__(self, decider: Decider, margin: float) -> None:
        self._decider = decider
        self._margin = margin

    def score(self, seen: Observation) -> Scores:
        """Score as the decider does; acceptable is what the check says at that margin."""
        acceptable = forecast(seen).keeps_limits(seen, margin=self._margin)
        return replace(self._decider.score(seen), acceptable=acceptable)


MARGIN = Range(0.5, 2.5, logarithmic=True)


def _impact(values: Values, _: np.random.Generator) -> Decider:
    return ImpactGreedy(ImpactParameters(**values))


def _latency_quality(values: Values, _: np.random.Generator) -> Decider:
    return LatencyQualityGreedy(**values)


def _weighted(values: Values, _: np.random.Generator) -> Decider:
    weights = {name: value for name, value in values.items() if name != "admission_margin"}
    return WithMargin(WeightedScore(ScoreWeights(**weights)), values["admission_margin"])


def _checked(algorithm: Algorithm, values: Values, rng: np.random.Generator) -> Decider:
    return WithMargin(make_decider(algorithm, rng), values["admission_margin"])


def spaces() -> dict[Algorithm, Space]:
    """All deciders with something to tune, starting from their present parameters."""
    weight = Range(0.0, 1.0)
    impact = Space(
        Algorithm.IMPACT_GREEDY,
        _impact,
        {
            "margin": Range(0.7, 1.6, logarithmic=True),
            "softness": Range(0.03, 0.5, logarithmic=True),
            "impact_weight": Range(0.5, 4.0, logarithmic=True),
            "least_value": Range(0.0, 0.25),
        },
        asdict(ImpactParameters()),
    )
    latency_quality = Space(
        Algorithm.LATENCY_QUALITY_GREEDY,
        _latency_quality,
        {"margin": MARGIN, "admission_margin": MARGIN},
        {
            "margin": LatencyQualityGreedy().margin,
            "admission_margin": LatencyQualityGreedy().admission_margin,
        },
    )
    weighted = Space(
        Algorithm.WEIGHTED_SCORE,
        _weighted,
        {"quality": weight, "latency": weight, "load": weight, "admission_margin": MARGIN},
        asdict(ScoreWeights())
        | {"admission_margin": ADMISSION_MARGINS.get(Algorithm.WEIGHTED_SCORE, 1.0)},
    )
    others = (
        Algorithm.RANDOM,
        Algorithm.ROUND_ROBIN,
        Algorithm.SHORTEST_QUEUE,
        Algorithm.LEAST_LOAD,
        Algorithm.QUALITY_GREEDY,
        Algorithm.BEST_EXPERT,
    )
    checked = [
        Space(
            algorithm,
            partial(_checked, algorithm),
            {"admission_margin": MARGIN},
            {"admission_margin": ADMISSION_MARGINS.get(algorithm, 1.0)},
            (Admission.REJECT,),
        )
        for algorithm in others
    ]
    return {space.algorithm: space for space in (impact, latency_quality, weighted, *checked)}


# --- Windows ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TrainingWindow:
    """One stretch of training requests."""

    workload: str
    load: float
    limit: str
    site: str
    """One of `SITES`."""
    seed: int
    requests: int

    def scenario(self, corpus: Corpus | None = None) -> Scenario:
        """Compose it; raises WorkloadError where the data is missing."""
        known = _corpus() if corpus is None else corpus
        return make_scenario(
            pool_snapshot=self._pool(),
            process=self.workload,
            load=self.load,
            limits=self.limit,
            split="train",
            requests=self.requests,
            seed=self.seed,
            corpus=known,
            predictor=_predicted() if corpus is None else None,
        )

    def _pool(self) -> Snapshot | Pool:
        if self.site == EDGE_SITE:
            return edge_site()
        return random_pool(np.random.default_rng([self.seed, POOL]), small_share=SMALL_SHARE)


def training_windows(
    count: int, *, requests: int, seed: int = 0, workloads: Sequence[str] = WORKLOADS
) -> tuple[TrainingWindow, ...]:
    """Windows over workloads, loads and limits, in an order that keeps every prefix mixed.

    No two have the same seed, so they differ in prompts too. Sites change after every two
    windows: admission rules take turns, and each site has to meet both.
    """
    cells = list(product(workloads, LOADS, LIMITS))
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(cells)) for _ in range(-(-count // len(cells)))])
    return tuple(
        TrainingWindow(
            workload, load, limit, SITES[i // 2 % len(SITES)], seed * 100_000 + i, requests
        )
        for i, (workload, load, limit) in enumerate(cells[cell] for cell in order[:count])
    )


@lru_cache(maxsize=1)
def _corpus() -> Corpus:
    return default_corpus("train")


@lru_cache(maxsize=1)
def _predicted() -> FloatArray | None:
    """Out of fold for real prompts; declared priors for synthetic ones."""
    if default_predictor() == PRIORS:
        return None
    from pointsman_learning.predictors.training import out_of_fold

    return out_of_fold(_corpus())


@lru_cache(maxsize=512)
def _scenario(window: TrainingWindow) -> Scenario:
    return window.scenario()


def play(space: Space, values: Values, window: TrainingWindow, admission: Admission) -> float:
    """Average QoS of one run."""
    scenario = _scenario(window)
    snapshot = scenario.snapshot.model_copy(
        update={"admission": admission, "algorithm": space.algorithm}
    )
    decider = space.make(values, np.random.default_rng(window.seed))
    outcome = simulate(replace(scenario, snapshot=snapshot), decider, seed=window.seed)
    return float(outcome.qos.mean())


# --- Search ----------------------------------------------------------------------------

Measure = Callable[[Values, TrainingWindow, Admission], float]


class Journal:
    """Results of runs on disk, one per line, so that a search that broke off goes on."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._known: dict[str, float] = {}
        if file is not None and file.exists():
            for line in file.read_text().splitlines():
                key, value = json.loads(line)
                self._known[key] = value

    def measured(self, space: Space) -> Measure:
        """Play, or remember having played."""

        def measure(values: Values, window: TrainingWindow, admission: Admission) -> float:
            run = [space.algorithm, dict(values), asdict(window), admission]
            key = json.dumps(run, sort_keys=True)
            if key not in self._known:
                self._known[key] = play(space, values, window, admission)
                if self._file is not None:
                    with self._file.open("a") as lines:
                        lines.write(json.dumps([key, self._known[key]]) + "\n")
            return self._known[key]

        return measure


@dataclass(frozen=True, slots=True)
class Effort:
    """How hard to try; the same for every decider of that many parameters."""

    windows: int = 96
    first_windows: int = 12
    candidates_per_parameter: int = 8
    local_rounds: int = 1
    keep: float = 1 / 3
    """Share that goes on to twice the windows."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """The result for one decider."""

    algorithm: Algorithm
    values: Values
    score: float
    """Mean average QoS over all windows."""
    start: Values
    start_score: float
    tried: int


def tune(
    space: Space,
    windows: Sequence[TrainingWindow],
    *,
    effort: Effort,
    measure: Measure,
    seed: int = 0,
    report: Callable[[str], None] = lambda _: None,
) -> Tuned:
    """Search the space; deterministic by ``seed``."""
    rng = np.random.default_rng([seed, len(space.algorithm)])
    size = len(space.ranges)
    count = effort.candidates_per_parameter * size
    shares = (np.argsort(rng.random((size, count)), axis=1).T + rng.random((count, size))) / count
    tried = [space.start, *(space.values(row) for row in shares.tolist())]
    best = _halve(space, tried, windows, effort=effort, measure=measure, report=report)
    for _ in range(effort.local_rounds):
        centre = np.array(space.shares(best))
        near = np.clip(centre + rng.normal(0.0, 0.08, (max(count // 2, 2), size)), 0.0, 1.0)
        more = [space.values(row) for row in near.tolist()]
        tried += more
        best = _halve(space, [best, *more], windows, effort=effort, measure=measure, report=report)

    def score(values: Values) -> float:
        return _mean(space, values, windows, measure)

    final = max((space.start, best), key=score)
    return Tuned(space.algorithm, final, score(final), space.start, score(space.start), len(tried))


def _halve(
    space: Space,
    candidates: Iterable[Values],
    windows: Sequence[TrainingWindow],
    *,
    effort: Effort,
    measure: Measure,
    report: Callable[[str], None],
) -> Values:
    """The best after rounds with ever fewer candidates and ever more windows."""
    left = list(candidates)
    for count in _rounds(effort.first_windows, len(windows)):
        scores = [_mean(space, values, windows[:count], measure) for values in left]
        order = np.argsort([-score for score in scores], kind="stable")
        best = left[order[0]]
        report(
            f"{space.algorithm}: {len(left)} on {counted(count, 'window')},"
            f" best {max(scores):.4f} {best}"
        )
        kept = max(round(len(left) * effort.keep), 1)
        left = [left[i] for i in order[: max(kept, 2)]]
    return left[0]


def _rounds(first: int, last: int) -> Iterator[int]:
    while first < last:
        yield first
        first *= 2
    yield last


def _mean(
    space: Space, values: Values, windows: Sequence[TrainingWindow], measure: Measure
) -> float:
    """Mean over windows; admission rules take turns."""
    rules = space.admissions
    return float(
        np.mean(
            [measure(values, window, rules[i % len(rules)]) for i, window in enumerate(windows)]
        )
    )


def document(
    found: Sequence[Tuned],
    windows: Sequence[TrainingWindow],
    *,
    effort: Effort,
    seed: int,
    command: str = "",
) -> dict[str, object]:
    """The results with where they come from, as plain data; ``command`` made them."""
    provenance = {
        "command": command,
        "windows": len(windows),
        "requests_per_window": windows[0].requests,
        "sites": sorted({window.site for window in windows}),
        "workloads": sorted({window.workload for window in windows}),
        "loads": LOADS,
        "limits": LIMITS,
        "seed": seed,
        "effort": asdict(effort),
        "example": _scenario(windows[0]).description,
    }
    return {
        "deciders": {
            result.algorithm.value: {
                "parameters": dict(result.values),
                "average_qos": round(result.score, 5),
                "from": dict(result.start),
                "from_average_qos": round(result.start_score, 5),
                "tried": result.tried,
                "provenance": provenance,
            }
            for result in found
        },
    }
