"""Shards of labels by many processes, on this machine or on Ray."""

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from pointsman_learning.training.config import ConfigError, LabelOptions
from pointsman_learning.training.domain import Domain
from pointsman_learning.training.lockstep import Policy
from pointsman_learning.training.rollouts import State, label
from pointsman_learning.training.shards import Shard
from pointsman_learning.workers import end_with_parent


@dataclass(frozen=True, slots=True)
class Task:
    """One shard to make."""

    domain: Domain
    options: LabelOptions
    seed: int
    file: Path
    policy: Path | None = None
    """A checkpoint's network, the base in place of ImpactGreedy."""


@dataclass(frozen=True, slots=True)
class Made:
    """A shard that is there."""

    file: Path
    states: int
    labels: int
    """State-action pairs."""
    cpu_s: float


def tasks(
    domain: Domain,
    options: LabelOptions,
    folder: Path,
    *,
    seed: int,
    count: int,
    policy: Path | None = None,
) -> list[Task]:
    """Shards that are missing in a folder; those that are there are kept.

    Raises:
        ConfigError: the folder's labels were made with other settings.

    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_settings(folder, domain, options, policy)
    files = [folder / f"{seed + i:08d}.npz" for i in range(count)]
    return [
        Task(domain, options, seed + i, file, policy)
        for i, file in enumerate(files)
        if not file.exists()
    ]


def _check_settings(
    folder: Path, domain: Domain, options: LabelOptions, policy: Path | None
) -> None:
    settings = {"domain": repr(domain), "rollouts": repr(options.rollouts)}
    if policy is not None:
        settings["followed"] = repr(options.followed)
    file = folder / "settings.json"
    if not file.exists():
        file.write_text(json.dumps(settings, indent=2) + "\n")
    elif json.loads(file.read_text()) != settings:
        raise ConfigError(
            f"{folder}: holds labels made with other settings; use another folder, or remove it"
        )


def work(task: Task) -> Made:
    """Make one shard; the same on every kind of worker."""
    started = time.process_time()
    base = None if task.policy is None else _policy(task.policy)
    found = list(_labelled(task, base))
    Shard.of(found, task.options.rollouts.bins).save(task.file)
    labels = sum(int(np.isfinite(state.own).sum()) for state in found)
    return Made(task.file, len(found), labels, time.process_time() - started)


def _labelled(task: Task, base: Policy | None) -> Iterator[State]:
    return label(
        task.domain,
        task.options.rollouts,
        seed=task.seed,
        policy=base,
        followed=None if base is None else task.options.followed,
    )


def _policy(file: Path) -> Policy:
    from pointsman_learning.training.checkpoints import load_network
    from pointsman_learning.training.policy import by_network

    return by_network(load_network(file))


def run(todo: Sequence[Task], *, jobs: int, ray: bool = False) -> Iterator[Made]:
    """Make shards, in any order; breaks off cleanly when the iterator is closed.

    Raises:
        ModuleNotFoundError: ``ray`` is asked for and not installed.
        ConfigError: it does not start.

    """
    if ray:
        yield from _on_ray(todo)
    elif jobs == 1:
        yield from map(work, todo)
    else:
        yield from _in_processes(todo, jobs)


def _start() -> None:
    """Processes share the cores; threads of their own would be in each other's way."""
    import torch

    end_with_parent()
    torch.set_num_threads(1)


def _in_processes(todo: Sequence[Task], jobs: int) -> Iterator[Made]:
    # Not forked: torch's and numba's threads do not survive it.
    with ProcessPoolExecutor(
        min(jobs, len(todo) or 1), mp_context=get_context("spawn"), initializer=_start
    ) as pool:
        futures: list[Future[Made]] = [pool.submit(work, task) for task in todo]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _on_ray(todo: Sequence[Task]) -> Iterator[Made]:
    """The same function on a Ray cluster; files go to a folder that all nodes share."""
    import ray  # type: ignore[import-not-found, unused-ignore]

    try:
        ray.init(ignore_reinit_error=True, log_to_driver=False)
    # What Ray raises has no common base.
    except Exception as error:  # noqa: BLE001
        said = " ".join(str(error).split())
        raise ConfigError(
            f"Ray does not start: {said} (docs/training.md tells of one cause)"
        ) from None
    remote = ray.remote(num_cpus=1)(work)
    waiting = [remote.remote(task) for task in todo]
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1)
        yield from ray.get(done)
