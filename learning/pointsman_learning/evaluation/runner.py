"""Runs a plan, in several processes."""

import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import lru_cache

from pointsman_learning.evaluation.metrics import (
    Metrics,
    Prompts,
    Routing,
    Timeline,
    measure,
    prompts,
    routing,
    timeline,
)
from pointsman_learning.evaluation.plan import Plan, Task, Window
from pointsman_learning.evaluation.registry import Contender, contenders, register
from pointsman_learning.simulator.scenario import Scenario
from pointsman_learning.workers import end_with_parent

Source = Callable[[Window], Scenario]
"""Makes a window's scenario, the same one at every call; hashable, and picklable for workers."""

ONE_THREAD = ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Processes are the parallelism: threads within them would only fight for cores."""


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A task's result."""

    task: Task
    metrics: Metrics
    routing: Routing
    timeline: Timeline
    prompts: Prompts | None
    load: float | None
    """The scenario's own, where it is known."""
    description: str
    """Where the scenario's parts come from."""
    wall_s: float


def run(task: Task, source: Source) -> Run:
    """Run one task in this process."""
    start = time.perf_counter()
    scenario = _scenario(source, task.window)
    # Only the rule differs between admissions: the requests are the very same.
    snapshot = scenario.snapshot.model_copy(update={"admission": task.admission})
    play = contenders()[task.decider].play
    outcome = play(replace(scenario, snapshot=snapshot), task.window.seed)
    return Run(
        task=task,
        metrics=measure(outcome),
        routing=routing(outcome),
        timeline=timeline(outcome),
        prompts=prompts(outcome),
        load=scenario.load,
        description=scenario.description,
        wall_s=time.perf_counter() - start,
    )


def run_all(
    tasks: Iterable[Task], source: Source, *, jobs: int = 1, extra: Sequence[Contender] = ()
) -> Generator[Run, None, None]:
    """Run all tasks, yielding each result when it is there, in any order.

    Closing the iterator, or an exception while it waits (Ctrl-C), ends the workers at once.
    What a task raises is raised here. ``extra`` are contenders that worker processes register,
    so they must be picklable; in this process they are the caller's to register (`registered`).
    """
    if jobs == 1:
        for task in tasks:
            yield run(task, source)
        return
    for name in ONE_THREAD:
        os.environ.setdefault(name, "1")
    with _Workers(jobs, extra) as workers:
        for future in as_completed([workers.submit(task, source) for task in tasks]):
            yield future.result()


@dataclass(slots=True)
class Pace:
    """How long the rest of a plan will take: guessed at first, then from its own runs."""

    left: Counter[str]
    """Runs to do, by decider."""
    guess_s: dict[str, float]
    """Seconds a run of each decider is thought to take."""
    jobs: int
    spent: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Runs done and their seconds, by decider."""

    @classmethod
    def of(cls, plan: Plan, *, requests: int, jobs: int) -> "Pace":
        """Before anything is known."""
        known = contenders()
        return cls(
            left=Counter(dict.fromkeys(plan.deciders, len(plan) // len(plan.deciders))),
            guess_s={n: known[n].ms_per_request * requests / 1e3 for n in plan.deciders},
            jobs=jobs,
        )

    def done(self, run: Run) -> None:
        """Take a finished run into account."""
        name = run.task.decider
        count, seconds = self.spent.get(name, (0, 0.0))
        self.spent[name] = count + 1, seconds + run.wall_s
        self.left[name] -= 1

    @property
    def left_s(self) -> float:
        """Seconds until the plan is done.

        Deciders not yet seen are guessed, by as much more or less as the others took.
        """
        guessed = sum(n * self.guess_s[name] for name, (n, _) in self.spent.items())
        taken = sum(seconds for _, seconds in self.spent.values())
        scale = taken / guessed if guessed > 0 else 1.0
        total = 0.0
        for name, runs in self.left.items():
            count, seconds = self.spent.get(name, (0, 0.0))
            total += runs * (seconds / count if count else scale * self.guess_s[name])
        return total / self.jobs


@lru_cache(maxsize=2)
def _scenario(source: Source, window: Window) -> Scenario:
    return source(window)


class _Workers:
    """A pool that can be ended at once."""

    def __init__(self, jobs: int, extra: Sequence[Contender]) -> None:
        # A fresh interpreter: forking one with threads (BLAS, onnxruntime) may hang.
        method = "forkserver" if sys.platform == "linux" else "spawn"
        self._before = set(multiprocessing.active_children())
        self._pool = ProcessPoolExecutor(
            jobs,
            mp_context=multiprocessing.get_context(method),
            initializer=_start,
            initargs=(tuple(extra),),
        )

    def submit(self, task: Task, source: Source) -> "Future[Run]":
        return self._pool.submit(run, task, source)

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._pool.shutdown()
            return
        ours = set(multiprocessing.active_children()) - self._before
        self._pool.shutdown(wait=False, cancel_futures=True)
        for worker in ours:
            worker.terminate()
        for worker in ours:
            worker.join()


def _start(extra: Iterable[Contender]) -> None:
    """Make a worker ready. Ctrl-C reaches the whole process group; the parent ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    for contender in extra:
        register(contender)
