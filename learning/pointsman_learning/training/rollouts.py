"""Labels by branch rollouts: what every action at a state would have come to.

A base policy runs through random scenarios. At sampled states every action (each eligible
endpoint, and rejection) is tried on a copy of the world, with the same requests to come; the
base policy takes the next decisions, then everything drains. What the requests then gained,
by predicted quality where in time, is kept in parts: by the new request, by those that were
there, and by those to come in bins of how far off they were. So horizons and discounts can be
chosen when training, not when labelling.

Beside them the targets of the action impact estimator, without any later arrival: is the new
request in time, and by how much does the QoS of those there change. That is exact but for
what nobody can know, the true lengths.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from pydantic import ConfigDict

from pointsman_core.deciders import ImpactGreedy
from pointsman_core.observation import Observation
from pointsman_core.state import BoolArray, FloatArray
from pointsman_learning.simulator.scenario import REJECTED
from pointsman_learning.training.domain import Domain, Drawn
from pointsman_learning.training.lockstep import Lockstep, Policy, by_decider, join, play

BINS = (5, 10, 20, 30, 45, 60, 75, 90, 120, 150, 200)
"""Ends of the bins of later requests, counted in decisions after the one in question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutOptions:
    """How labels are made."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    horizon: int = 90
    """Decisions of the base policy after the one in question."""
    requests: int = 400
    """Of a scenario."""
    trunks: int = 16
    """Scenarios that the base policy runs through at once."""
    states_per_scenario: int = 12
    explore: float = 0.05
    """Share of decisions in the scenario that are drawn at random, so that states vary."""
    lanes_at_once: int = 1500
    """Endpoints of all branches played at once: large for speed, small for the cache."""

    @property
    def bins(self) -> tuple[int, ...]:
        """Ends of the bins up to the horizon."""
        return (*(end for end in BINS if end < self.horizon), self.horizon)


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """A decision, and what each action came to; NaN for actions that are not eligible."""

    seen: Observation
    may_reject: bool
    chosen: int
    """By the base policy: endpoint, or E for rejection."""
    own: FloatArray
    """(E + 1,) QoS of the new request."""
    present: FloatArray
    """(E + 1,) QoS of the requests there, less that under rejection."""
    later: FloatArray
    """(E + 1, bins) QoS of the requests to come, less that under rejection."""
    quiet_in_time: FloatArray
    """(E,) 1 where the new request is in time if no other comes."""
    quiet_present: FloatArray
    """(E,) change of the QoS of the requests there if no other comes."""
    drawn: Drawn | None = field(default=None, repr=False)


def label(
    domain: Domain,
    options: RolloutOptions,
    *,
    seed: int,
    policy: Policy | None = None,
    followed: int | None = None,
) -> Iterator[State]:
    """States of ``options.trunks`` scenarios with their labels; deterministic by seed.

    The base policy is ImpactGreedy, or ``policy``; with ``followed`` a branch follows that one
    for so many decisions only, and ImpactGreedy, which is much quicker, from there.
    """
    usual = by_decider(ImpactGreedy())
    base = policy or usual
    plan = _Plan(base, usual, options.horizon if followed is None else followed, options)
    first = seed * options.trunks
    drawn = [domain.draw(first + i, requests=options.requests) for i in range(options.trunks)]
    rng = np.random.default_rng([seed, 78])
    trunk = Lockstep.of([one.scenario for one in drawn])
    wanted = _sampled(rng, options)
    batch: list[_Branching] = []
    for step in range(options.requests - options.horizon):
        trunk.advance_to_arrivals()
        seen = trunk.observe()
        chosen = base(trunk, seen)
        for world in np.flatnonzero(wanted[:, step]).tolist():
            here = _Branching.of(trunk, seen, world, int(chosen[world]), options, drawn[world])
            if here is not None:
                batch.append(here)
        trunk.apply(_explored(rng, trunk, seen, chosen, options.explore))
        if sum(one.lanes for one in batch) >= options.lanes_at_once:
            yield from _play_out(batch, plan)
            batch = []
    if batch:
        yield from _play_out(batch, plan)


def _sampled(rng: np.random.Generator, options: RolloutOptions) -> BoolArray:
    """(trunks, requests) at which decisions to branch; the first few find empty endpoints."""
    steps = options.requests - options.horizon
    if steps < 1:
        raise ValueError(f"{options.requests} requests are too few for {options.horizon} ahead")
    wanted = np.zeros((options.trunks, options.requests), np.bool_)
    for row in wanted:
        count = min(options.states_per_scenario, steps)
        row[rng.choice(steps, size=count, replace=False)] = True
    return wanted


def _explored(
    rng: np.random.Generator, worlds: Lockstep, seen: Observation, chosen: np.ndarray, share: float
) -> np.ndarray:
    """Some choices replaced by random eligible ones."""
    lots = worlds.padded(np.where(seen.eligible, rng.random(len(seen.eligible)), -1.0), -1.0)
    random = np.where(lots.max(axis=1) < 0, REJECTED, lots.argmax(axis=1))
    return np.where(rng.random(len(chosen)) < share, random, chosen)


@dataclass(frozen=True, slots=True, eq=False)
class _Branching:
    """A state that is to be branched."""

    world: Lockstep
    seen: Observation
    actions: tuple[int, ...]
    """Eligible endpoints and, last, `REJECTED`."""
    present: int
    """Requests in flight."""
    chosen: int
    drawn: Drawn

    @property
    def lanes(self) -> int:
        return int(self.world.endpoints[0]) * len(self.actions)

    @classmethod
    def of(
        cls,
        trunk: Lockstep,
        seen: Observation,
        world: int,
        chosen: int,
        options: RolloutOptions,
        drawn: Drawn,
    ) -> "_Branching | None":
        part = trunk.one(seen, world)
        actions = np.flatnonzero(part.eligible).tolist()
        if not actions:
            return None
        return cls(
            trunk.take(world, options.horizon + 1),
            part,
            (*actions, REJECTED),
            len(part.resident_candidate),
            len(part.quality) if chosen == REJECTED else chosen,
            drawn,
        )


@dataclass(frozen=True, slots=True)
class _Plan:
    """How branches go on."""

    base: Policy
    then: Policy
    followed: int
    """Decisions of ``base``; the rest up to the horizon are those of ``then``."""
    options: RolloutOptions


def _play_out(batch: Sequence[_Branching], plan: _Plan) -> Iterator[State]:
    options = plan.options
    branches = join([one.world for one in batch], [len(one.actions) for one in batch])
    first = branches.slot.copy()
    branches.apply(np.array([action for one in batch for action in one.actions]))
    quiet = branches.copy()
    quiet.drain(mishaps=False)
    followed = min(plan.followed, options.horizon)
    play(branches, plan.base, followed)
    play(branches, plan.then, options.horizon - followed)
    branches.drain()
    at = 0
    for one in batch:
        rows = first[at : at + len(one.actions)]
        at += len(one.actions)
        yield _state(one, rows, branches, quiet, options)


def _state(
    one: _Branching,
    rows: np.ndarray,
    branches: Lockstep,
    quiet: Lockstep,
    options: RolloutOptions,
) -> State:
    """Tell what became of the branches whose new requests are the slots ``rows``."""
    there = rows[:, None] + np.arange(-one.present, 0)
    ahead = rows[:, None] + np.arange(1, options.horizon + 1)
    starts = np.array([0, *options.bins[:-1]])
    later = np.add.reduceat(branches.qos(ahead), starts, axis=1)
    present = branches.qos(there).sum(axis=1)
    alone = quiet.qos(there).sum(axis=1)
    size = len(one.seen.quality)
    places = [size if action == REJECTED else action for action in one.actions]
    table = np.full((size + 1, 4 + later.shape[1]), np.nan)
    table[places, 0] = branches.qos(rows)
    table[places, 1] = present - present[-1]
    table[places, 2] = quiet.in_time(rows)
    table[places, 3] = alone - alone[-1]
    table[places, 4:] = later - later[-1]
    return State(
        seen=one.seen,
        may_reject=one.world.worlds[0].may_reject,
        chosen=one.chosen,
        own=table[:, 0],
        present=table[:, 1],
        later=table[:, 4:],
        quiet_in_time=table[:size, 2],
        quiet_present=table[:size, 3],
        drawn=one.drawn,
    )
