"""Discrete soft actor-critic on the simulator.

After Haarnoja et al. (arXiv 1812.05905) and Christodoulou (arXiv 1910.07207): with few actions
all expectations over the policy are sums over the actions that are valid, never samples, and
masks are large finite numbers, so that no row becomes NaN. The target entropy is a share of
the logarithm of the number of valid actions, which varies from decision to decision.

The tailored reward (ours). Let F_j be the summed QoS, by predicted quality, that the requests
up to the j-th would come to if none came after it. Decision j is credited with

    r_j = F_j - F_(j-1)

that is the QoS of its own request, less what that takes from those already there, both
exactly: by draining a copy of the simulation. The credit is there at once, although requests
finish much later, and sums of it telescope to the QoS of all requests, so it shapes nothing.
The plain reward, an ablation, is the QoS that a decision's own request had in the end.

The level of what is to come is a hundred times the differences between actions. So values are
split as in dueling networks (Wang et al., arXiv 1511.06581): a value of the state, used in
training only, plus the network's values less their mean under the policy. An error of the
level then moves, on average over the policy's actions, no difference between actions; and the
soft value of a state is its level plus the temperature times the policy's entropy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pointsman_core.graph import FEATURES
from pointsman_core.state import BoolArray, FloatArray, IntArray
from pointsman_learning.han import GraphStore, HanNetwork, Output, PaddedBatch
from pointsman_learning.predictors.cache import write_whole
from pointsman_learning.simulator.scenario import REJECTED
from pointsman_learning.training.config import SacOptions
from pointsman_learning.training.domain import Domain
from pointsman_learning.training.lockstep import Lockstep
from pointsman_learning.training.policy import chosen_by, graphs_of

NEVER = -1e9
LEVEL_RATE = 3e-3
"""Learning rate of the value of a state, which has far to go."""
FIRST_SEED = 500_000_000
"""Scenarios of rounds; labels have others."""


# --- Experience ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Experience:
    """One round: T decisions in each of G worlds, by time and then by world."""

    graphs: GraphStore
    """T x G of them."""
    action: IntArray
    """(T x G,) endpoint, or `REJECTED`."""
    reward: FloatArray
    """(T x G,)"""
    may_reject: BoolArray
    """(T x G,)"""
    worlds: int
    """G"""

    def __len__(self) -> int:
        """Decisions whose next one is known."""
        return len(self.action) - self.worlds

    def save(self, file: Path) -> None:
        """Write it whole or not at all."""
        graphs = {f"graphs_{f.name}": getattr(self.graphs, f.name) for f in fields(GraphStore)}
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "graphs"}
        write_whole(file, lambda stream: np.savez(stream, **graphs, **own))

    @classmethod
    def load(cls, file: Path) -> "Experience":
        """Read what `save` wrote."""
        with np.load(file, allow_pickle=False) as kept:
            graphs = GraphStore(**{f.name: kept[f"graphs_{f.name}"] for f in fields(GraphStore)})
            return cls(
                graphs, kept["action"], kept["reward"], kept["may_reject"], int(kept["worlds"])
            )


def collect(
    network: HanNetwork,
    domain: Domain,
    options: SacOptions,
    *,
    round_number: int,
    seed: int,
    own_only: bool = False,
    device: str = "cpu",
) -> Experience:
    """Play fresh scenarios with the stochastic policy; deterministic by seed and round."""
    rng = np.random.default_rng([seed, 79, round_number])
    first = FIRST_SEED + (seed * 1_000_000 + round_number) * options.worlds
    eased = replace(domain, loads=_loads(domain, options, round_number))
    worlds = Lockstep.of(
        [eased.draw(first + i, requests=options.requests).scenario for i in range(options.worlds)]
    )
    slots = np.arange(options.worlds * options.requests).reshape(options.worlds, -1)
    graphs, actions, rewards = [], [], []
    before = np.zeros(options.worlds)
    for _ in range(options.requests):
        worlds.advance_to_arrivals()
        here = graphs_of(worlds, worlds.observe())
        chosen = chosen_by(network, worlds, here, device=device, rng=rng)
        worlds.apply(chosen)
        graphs.append(here)
        actions.append(chosen)
        if not own_only:
            quiet = worlds.copy()
            quiet.drain(mishaps=False)
            after = quiet.qos(slots).sum(axis=1)
            rewards.append(after - before)
            before = after
    if own_only:
        worlds.drain()
        rewards = list(worlds.qos(slots).T)
    rejects = np.array([world.may_reject for world in worlds.worlds])
    return Experience(
        GraphStore.join(graphs),
        np.concatenate(actions),
        np.concatenate(rewards),
        np.tile(rejects, options.requests),
        options.worlds,
    )


def _loads(domain: Domain, options: SacOptions, round_number: int) -> tuple[float, float]:
    """Curriculum: the heaviest load grows evenly from round to round."""
    low, high = domain.loads
    progress = round_number / max(options.rounds - 1, 1)
    start = min(max(options.start_load, low), high)
    return low, start + (high - start) * progress


@dataclass(frozen=True, slots=True)
class Step:
    """A batch of B decisions and the ones after them."""

    now: PaddedBatch
    then: PaddedBatch
    action: Tensor
    """(B, 1) column of the chosen action"""
    reward: Tensor
    """(B,)"""
    may_reject: Tensor
    """(B,) bool"""

    def to(self, device: str) -> "Step":
        """The same on a device."""
        return Step(*(getattr(self, f.name).to(device) for f in fields(self)))


class Replay:
    """The latest rounds, up to a number of decisions."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self.rounds: list[Experience] = []

    def __len__(self) -> int:
        return sum(map(len, self.rounds))

    def add(self, one: Experience) -> None:
        """Keep a round; the oldest go where there are too many, but never the latest."""
        self.rounds.append(one)
        while len(self.rounds) > 1 and len(self) > self._capacity:
            self.rounds.pop(0)

    def draw(self, rng: np.random.Generator, size: int) -> Step:
        """A random batch, all of one round: so little needs to be gathered."""
        weights = np.array([len(one) for one in self.rounds], np.float64)
        one = self.rounds[int(rng.choice(len(weights), p=weights / weights.sum()))]
        numbers = rng.integers(len(one), size=size)
        now, then = one.graphs.batch(numbers), one.graphs.batch(numbers + one.worlds)
        action = one.action[numbers]
        column = np.where(action == REJECTED, now.eligible.shape[1], action)
        return Step(
            now,
            then,
            torch.from_numpy(column)[:, None],
            torch.from_numpy(one.reward[numbers].astype(np.float32)),
            torch.from_numpy(one.may_reject[numbers]),
        )


# --- Learning --------------------------------------------------------------------------


class Level(nn.Module):
    """Twin values of a state, from the request's features; they begin at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(len(FEATURES["request"]), 64)
        self.last = nn.Linear(64, 2)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, batch: PaddedBatch) -> Tensor:
        """(2, B)."""
        level: Tensor = self.last(torch.relu(self.first(batch.request)))  # (B, 2)
        return level.T


def allowed(out: Output, may_reject: Tensor) -> Tensor:
    """(B, E + 1) actions that count; rejection is one wherever there is no other."""
    valid = out.valid.clone()
    valid[:, -1] &= may_reject | ~valid[:, :-1].any(dim=1)
    return valid


def policy_of(logits: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """(B, E + 1) probabilities, 0 where not valid, and finite logarithms of them."""
    log_p = torch.log_softmax(logits.masked_fill(~valid, NEVER), dim=-1)
    return torch.where(valid, log_p.exp(), 0.0), torch.where(valid, log_p, 0.0)


def soft_value(values: Tensor, logits: Tensor, valid: Tensor, temperature: Tensor) -> Tensor:
    """(B,) sum over the valid actions of p (value - temperature log p)."""
    p, log_p = policy_of(logits, valid)
    return (p * (torch.where(valid, values, 0.0) - temperature * log_p)).sum(dim=-1)


def advantages(twin_q: Tensor, p: Tensor) -> Tensor:
    """(2, B, E + 1) values less their mean under the policy ``p`` (B, E + 1)."""
    return twin_q - (p * twin_q).sum(dim=-1, keepdim=True)


def target_entropy(valid: Tensor, share: float) -> Tensor:
    """(B,) a share of the most that is possible."""
    return share * torch.log(valid.sum(dim=-1).to(torch.float32).clamp(min=1.0))


@dataclass(frozen=True, slots=True)
class SacLosses:
    """Of one batch."""

    critic: Tensor
    actor: Tensor
    temperature: Tensor
    entropy: Tensor
    """Mean, for the curves."""


class Learner:
    """The network, the level and its slow copy, and the temperature."""

    def __init__(self, network: HanNetwork, options: SacOptions, *, device: str = "cpu") -> None:
        self.options = options
        self.device = device
        self.network = network.to(device)
        self.level = Level().to(device)
        self.target = Level().to(device)
        self.target.load_state_dict(self.level.state_dict())
        self.mean_reward = 0.0  # taken off all rewards, so that levels stay near 0
        self.log_temperature = nn.Parameter(
            torch.tensor(float(np.log(options.temperature)), device=device)
        )
        self.optimiser = torch.optim.Adam(
            [
                {"params": self.network.parameters(), "lr": options.learning_rate},
                {"params": self.level.parameters(), "lr": LEVEL_RATE},
                {"params": [self.log_temperature], "lr": options.learning_rate},
            ]
        )

    def losses(self, step: Step) -> SacLosses:
        """Critic, actor and temperature on one batch."""
        temperature = self.log_temperature.exp().detach()
        out = self.network(step.now)
        valid = allowed(out, step.may_reject)
        p, log_p = policy_of(out.logits, valid)
        advantage = advantages(out.twin_q, p.detach())  # (2, B, E + 1)
        done = advantage.gather(2, step.action.expand(2, -1, -1)).squeeze(-1)  # (2, B)
        critic = functional.huber_loss(
            self.level(step.now) + done, self._wanted(step, temperature).expand_as(done)
        )
        least = out.twin_q.amin(dim=0).detach()
        actor = -soft_value(least, out.logits, valid, temperature).mean()
        entropy = -(p * log_p).sum(dim=-1).detach()
        surplus = entropy - target_entropy(valid, self.options.entropy)
        return SacLosses(critic, actor, self.log_temperature * surplus.mean(), entropy.mean())

    def _wanted(self, step: Step, temperature: Tensor) -> Tensor:
        """(B,) reward plus the discounted soft value of the next state."""
        with torch.no_grad():
            then = self.network(step.then)
            p, log_p = policy_of(then.logits, allowed(then, step.may_reject))
            ahead = self.target(step.then).amin(dim=0) - temperature * (p * log_p).sum(dim=-1)
            wanted: Tensor = step.reward - self.mean_reward + self.options.discount * ahead
        return wanted

    def update(self, step: Step, extra: Tensor | None = None) -> SacLosses:
        """One gradient step, and one of the level's copy; ``extra`` is a loss to be added."""
        found = self.losses(step.to(self.device))
        total = found.critic + found.actor + found.temperature
        if extra is not None:
            total = total + extra
        self.optimiser.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        self.optimiser.step()
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.level.parameters(), strict=True):
                slow.lerp_(fast, self.options.target_rate)
        return found

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {
            "network": self.network.state_dict(),
            "level": self.level.state_dict(),
            "target": self.target.state_dict(),
            "log_temperature": self.log_temperature.detach().cpu(),
            "mean_reward": self.mean_reward,
            "optimiser": self.optimiser.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.network.load_state_dict(state["network"])
        self.level.load_state_dict(state["level"])
        self.target.load_state_dict(state["target"])
        with torch.no_grad():
            self.log_temperature.copy_(state["log_temperature"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.mean_reward = state["mean_reward"]


def mean_of(found: Sequence[SacLosses]) -> dict[str, float]:
    """Averages for the curves."""
    names = [f.name for f in fields(SacLosses)]
    return {
        name: float(np.mean([float(getattr(one, name).detach()) for one in found]))
        for name in names
    }
