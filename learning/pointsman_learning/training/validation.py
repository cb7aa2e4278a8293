"""How good a policy is on validation windows, paired with ImpactGreedy on the same ones."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import ConfigDict

from pointsman_core.deciders import ImpactGreedy
from pointsman_core.resources import Admission
from pointsman_core.state import FloatArray, IntArray
from pointsman_learning.evaluation import (
    Composer,
    Interval,
    available_workloads,
    default_predictor,
)
from pointsman_learning.evaluation.plan import Window
from pointsman_learning.evaluation.statistics import mean_intervals
from pointsman_learning.simulator.scenario import REJECTED, Scenario
from pointsman_learning.training.lockstep import Lockstep, Policy, by_decider, play


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationOptions:
    """Windows of the validation split: other prompts and other times than in training."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    workloads: tuple[str, ...] = ("poisson", "on-off", "azure-conv", "azure-code")
    loads: tuple[float, ...] = (0.5, 0.9)
    limits: tuple[str, ...] = ("x1", "x2.5", "x5")
    reject: tuple[bool, ...] = (True, False)
    """Whether requests may be rejected, and whether all are served with best effort."""
    seeds: int = 4
    requests: int = 400
    worlds_at_once: int = 24

    def cells(self) -> Iterator[tuple[str, float, str, bool]]:
        """Kinds of windows, those of one admission after the other: each keeps its windows."""
        for rejects in self.reject:
            for cell in product(self.workloads, self.loads, self.limits):
                yield (*cell, rejects)


@dataclass(frozen=True, slots=True, eq=False)
class Validation:
    """Windows ready to be played, in the order of cells, seeds innermost."""

    options: ValidationOptions
    scenarios: tuple[Scenario, ...]

    @classmethod
    def of(
        cls,
        options: ValidationOptions,
        *,
        experts: Path | None = None,
        policy: str | None = None,
        quality_data: Path | None = None,
        arrivals: Path | None = None,
        predictor: str | None = None,
    ) -> "Validation":
        """Compose them, of the workloads whose data is at hand.

        Raises WorkloadError where data does not fit, ArtefactError for a wrong predictor.
        """
        known = {*available_workloads(), None if arrivals is None else arrivals.stem}
        at_hand = tuple(name for name in options.workloads if name in known)
        options = replace(options, workloads=at_hand)
        composer = Composer(
            requests=options.requests,
            predictor=predictor or default_predictor(quality_data),
            experts=experts,
            policy=policy,
            quality_data=quality_data,
            arrivals=arrivals,
            split="validation",
        )
        return cls(options, tuple(_scenarios(composer, options)))

    def play(self, policy: Policy, *, report: Callable[[int], None] = lambda _: None) -> "Played":
        """Play all windows."""
        at_once = self.options.worlds_at_once
        actual, predicted, rejected = [], [], []
        for start in range(0, len(self.scenarios), at_once):
            worlds = Lockstep.of(self.scenarios[start : start + at_once])
            play(worlds, policy, self.options.requests)
            worlds.drain()
            slots = np.arange(len(worlds) * self.options.requests).reshape(len(worlds), -1)
            actual.append(worlds.qos(slots, actual=True).mean(axis=1))
            predicted.append(worlds.qos(slots).mean(axis=1))
            rejected.append((worlds.choice(slots) == REJECTED).mean(axis=1))
            report(len(worlds))
        return Played(*(np.concatenate(each) for each in (actual, predicted, rejected)))

    def baseline(self) -> "Played":
        """What ImpactGreedy makes of them."""
        return self.play(by_decider(ImpactGreedy()))

    def rows(self, played: "Played", base: "Played") -> "list[Row]":
        """Compare by kind of window; the last row is over all."""
        seeds = self.options.seeds
        cells = list(self.options.cells())
        found = []
        for index, cell in enumerate([*cells, None]):
            own = slice(None) if cell is None else slice(index * seeds, (index + 1) * seeds)
            name = "all" if cell is None else _name(cell)
            found.append(Row.of(name, played.part(own), base.part(own)))
        for workload in self.options.workloads:
            own_cells = [i for i, cell in enumerate(cells) if cell[0] == workload]
            windows = np.concatenate([np.arange(seeds) + i * seeds for i in own_cells])
            found.append(Row.of(f"{workload}, all", played.part(windows), base.part(windows)))
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Played:
    """Averages of each window, (W,)."""

    qos: FloatArray
    predicted_qos: FloatArray
    """The same by predicted quality: what the policy can know, and less noisy."""
    rejected: FloatArray

    def part(self, windows: slice | IntArray) -> "Played":
        """Some windows."""
        return Played(self.qos[windows], self.predicted_qos[windows], self.rejected[windows])


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison; differences in per cent of ImpactGreedy's mean."""

    name: str
    windows: int
    base: float
    qos: float
    gain: Interval
    """Of average QoS."""
    predicted_gain: Interval
    rejected: tuple[float, float]
    """ImpactGreedy's share of rejected requests, and the policy's."""

    @classmethod
    def of(cls, name: str, played: Played, base: Played) -> "Row":
        """Compare on the same windows."""
        return cls(
            name,
            len(base.qos),
            float(base.qos.mean()),
            float(played.qos.mean()),
            _gain(played.qos, base.qos),
            _gain(played.predicted_qos, base.predicted_qos),
            (float(base.rejected.mean()), float(played.rejected.mean())),
        )


def _gain(ours: FloatArray, theirs: FloatArray) -> Interval:
    relative = 100.0 * (ours - theirs) / max(float(theirs.mean()), 1e-9)
    return mean_intervals(relative[None])[0]


def _name(cell: tuple[str, float, str, bool]) -> str:
    workload, load, limit, rejects = cell
    return f"{workload} {load:g} {limit}{'' if rejects else ' best effort'}"


def _scenarios(composer: Composer, options: ValidationOptions) -> Iterator[Scenario]:
    for index, (workload, load, limit, rejects) in enumerate(options.cells()):
        admission = Admission.REJECT if rejects else Admission.BEST_EFFORT
        # No two windows share a seed: one of the same seed has the same prompts and noise, and
        # intervals over such windows would be too narrow.
        for seed in range(index * options.seeds, (index + 1) * options.seeds):
            window = Window(workload=workload, load=load, limit=limit, seed=seed)
            scenario = composer(window)
            snapshot = scenario.snapshot.model_copy(update={"admission": admission})
            yield replace(scenario, snapshot=snapshot)
