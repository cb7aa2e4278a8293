"""What is trained on: random scenarios of the training split ("domain randomisation"). Ours."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import ConfigDict

from pointsman_common.data_folder import TEST_SCORES, TRACES
from pointsman_core.resources import Admission
from pointsman_core.state import FloatArray
from pointsman_core.workload import WorkloadError
from pointsman_learning.simulator.scenario import Scenario
from pointsman_learning.workloads import (
    ArrivalProcess,
    Corpus,
    DataFolder,
    OnOff,
    Pool,
    Process,
    arrival_process,
    default_corpus,
    edge_site,
    load_pool,
    make_scenario,
    outages,
    random_pool,
    user_arrivals,
    user_corpus,
)

LEARNED, DECLARED, NOISY = "learned", "declared", "noisy"
"""Predicted quality: out of fold, declared priors, or out of fold drawn towards its mean."""
DRAW = 77
"""Keeps these draws apart from those within a scenario."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """Ranges that scenarios are drawn from; shares are probabilities."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    experts: Path | None = None
    """Manifests; None: the edge site of the examples."""
    policy: str | None = None
    quality_data: Path | None = None
    arrivals: Path | None = None
    """A trace of one's own; it takes the place of the two public ones."""
    site_share: float = 0.5
    """The site itself; the rest are random pools, or subsets of one's own experts."""
    least_endpoints: int = 2
    most_endpoints: int = 16
    small_share: float = 0.15
    """Of a random pool's endpoints that are models of which no scores are known."""
    loads: tuple[float, float] = (0.2, 1.5)
    limits: Mapping[str, float] = field(
        default_factory=lambda: {"mixed": 0.4, "x1": 0.3, "x2.5": 0.15, "x5": 0.15}
    )
    processes: Mapping[str, float] = field(
        default_factory=lambda: {
            "poisson": 0.25,
            "on-off": 0.25,
            "azure-conv": 0.25,
            "azure-code": 0.25,
        }
    )
    reject_share: float = 0.75
    """Scenarios in which requests may be rejected."""
    outage_share: float = 0.15
    predictors: Mapping[str, float] = field(
        default_factory=lambda: {LEARNED: 0.7, DECLARED: 0.1, NOISY: 0.2}
    )
    length_errors: tuple[float, ...] = (0.3, 0.5, 0.5, 0.7)

    def draw(self, seed: int, *, requests: int) -> "Drawn":
        """Make the scenario of that number; equal numbers give equal scenarios."""
        rng = np.random.default_rng([seed, DRAW])
        pool = self._pool(rng)
        name = _pick(rng, self._known_processes())
        load = float(rng.uniform(*self.loads))
        limits = _pick(rng, self.limits)
        rejects, fails = rng.random() < self.reject_share, rng.random() < self.outage_share
        scenario = make_scenario(
            pool_snapshot=pool,
            process=self._process(rng, name),
            load=load,
            limits=limits,
            split="train",
            requests=requests,
            seed=seed,
            corpus=_corpus(self.quality_data),
            predictor=self._predictor(rng),
            length_error=float(rng.choice(self.length_errors)),
            mishaps=outages if fails else None,
            admission=Admission.REJECT if rejects else Admission.BEST_EFFORT,
        )
        return Drawn(scenario, process=name, load=load, limits=limits, pool=pool.name)

    def check(self) -> None:
        """Load all that scenarios are drawn from, so that what is wrong with it is told at once.

        Raises:
            ManifestErrors, WorkloadError: it cannot be used, or no workload's data is at hand.

        """
        if not self._known_processes():
            raise WorkloadError("the data of none of them is at hand", source="domain.processes")
        for name in self._known_processes():
            make_scenario(
                pool_snapshot=_site(self.experts, self.policy),
                process=self._process(np.random.default_rng(0), name),
                load=1.0,
                split="train",
                requests=2,
                seed=0,
                corpus=_corpus(self.quality_data),
            )

    def _predictor(self, rng: np.random.Generator) -> FloatArray | None:
        """(P, X) predicted quality; None: declared priors."""
        kind, blur = _pick(rng, self.predictors), float(rng.uniform(0.3, 0.7))
        if kind == DECLARED or _synthetic(self.quality_data):
            return None
        said = _out_of_fold(self.quality_data)
        return said if kind == LEARNED else (1 - blur) * said + blur * said.mean(axis=0)

    def _known_processes(self) -> Mapping[str, float]:
        if self.arrivals is not None:
            own = sum(share for name, share in self.processes.items() if name in TRACES)
            rest = {n: s for n, s in self.processes.items() if n not in TRACES}
            return rest | {self.arrivals.stem: own}
        folder = DataFolder.find()
        return {
            name: share
            for name, share in self.processes.items()
            if name not in TRACES or (folder is not None and folder.has(TRACES[Process(name)]))
        }

    def _process(self, rng: np.random.Generator, name: str) -> ArrivalProcess:
        if self.arrivals is not None and name == self.arrivals.stem:
            return user_arrivals(self.arrivals, "train")
        if name != Process.ON_OFF:
            return arrival_process(name, split="train")
        bursts = OnOff(
            on_s=float(rng.uniform(4.0, 20.0)),
            off_s=float(rng.uniform(15.0, 45.0)),
            ratio=float(rng.uniform(3.0, 8.0)),
        )
        return arrival_process(name, split="train", on_off=bursts)

    def _pool(self, rng: np.random.Generator) -> Pool:
        site = _site(self.experts, self.policy)
        if rng.random() < self.site_share:
            return site
        if self.quality_data is not None or self.experts is not None:
            return _subset(rng, site)
        count = int(rng.integers(self.least_endpoints, self.most_endpoints + 1))
        return random_pool(rng, count, small_share=self.small_share)


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """A scenario and what it was drawn as."""

    scenario: Scenario
    process: str
    load: float
    limits: str
    pool: str


def _pick(rng: np.random.Generator, shares: Mapping[str, float]) -> str:
    names = list(shares)
    weights = np.array([shares[name] for name in names], np.float64)
    return names[int(rng.choice(len(names), p=weights / weights.sum()))]


def _subset(rng: np.random.Generator, pool: Pool) -> Pool:
    """Some of a pool's endpoints, at least two where there are."""
    candidates = pool.snapshot.candidates
    least = min(2, len(candidates))
    count = int(rng.integers(least, len(candidates) + 1))
    kept = np.sort(rng.permutation(len(candidates))[:count])
    chosen = tuple(candidates[int(i)] for i in kept)
    return replace(pool, snapshot=pool.snapshot.model_copy(update={"candidates": chosen}))


@lru_cache(maxsize=4)
def _site(experts: Path | None, policy: str | None) -> Pool:
    snapshot = edge_site() if experts is None else load_pool(experts, policy=policy)
    return Pool(snapshot, {}, snapshot.full_name)


def _synthetic(quality_data: Path | None) -> bool:
    folder = DataFolder.find()
    return quality_data is None and (folder is None or not folder.has(TEST_SCORES))


@lru_cache(maxsize=2)
def _corpus(quality_data: Path | None) -> Corpus:
    return default_corpus("train") if quality_data is None else user_corpus(quality_data, "train")


@lru_cache(maxsize=2)
def _out_of_fold(quality_data: Path | None) -> FloatArray:
    from pointsman_learning.predictors import out_of_fold

    return out_of_fold(_corpus(quality_data))
