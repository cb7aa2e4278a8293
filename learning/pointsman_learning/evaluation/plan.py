"""What is to be run: windows x admission rules x deciders."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from pointsman_core.resources import Admission


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """One stretch of requests; every decider meets the very same ones."""

    workload: str
    load: float | None
    """Share of the site's estimated capacity; None: a trace's arrivals as recorded."""
    limit: str
    """Distribution of the limits, such as ``x2.5``."""
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One run."""

    window: Window
    admission: Admission
    decider: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All combinations of the following."""

    workloads: Sequence[str]
    loads: Sequence[float | None]
    """None stands alone: then the loads are what the runs turn out to have."""
    limits: Sequence[str]
    admissions: Sequence[Admission]
    deciders: Sequence[str]
    seeds: Sequence[int]

    def tasks(self) -> Iterator[Task]:
        """In an order that keeps the runs of one window together, seeds outermost.

        So an evaluation that is broken off has met all deciders under all circumstances,
        in fewer windows.
        """
        windows = product(self.seeds, self.workloads, self.loads, self.limits)
        for seed, workload, load, limit in windows:
            window = Window(workload=workload, load=load, limit=limit, seed=seed)
            for admission, decider in product(self.admissions, self.deciders):
                yield Task(window=window, admission=admission, decider=decider)

    @property
    def as_recorded(self) -> bool:
        """Whether traces are replayed as they were recorded."""
        return None in self.loads

    def __len__(self) -> int:
        cells = len(self.workloads) * len(self.loads) * len(self.limits) * len(self.admissions)
        return cells * len(self.deciders) * len(self.seeds)
