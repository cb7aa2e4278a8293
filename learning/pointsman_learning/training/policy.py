"""The network as a policy of worlds in lockstep."""

import numpy as np
import torch

from pointsman_core.graph import encode
from pointsman_core.observation import Observation
from pointsman_core.state import IntArray
from pointsman_learning.han import GraphStore, HanNetwork
from pointsman_learning.simulator.scenario import REJECTED
from pointsman_learning.training.lockstep import Lockstep, Policy


def graphs_of(worlds: Lockstep, seen: Observation) -> GraphStore:
    """The graph of each world's decision, in order."""
    return GraphStore.of(
        encode(worlds.one(seen, world, alike=count), groups=count)
        for world, count in worlds.alike(seen)
    )


def by_network(
    network: HanNetwork, *, device: str = "cpu", rng: np.random.Generator | None = None
) -> Policy:
    """The action of the highest value; with ``rng`` one drawn from the stochastic policy."""

    def choose(worlds: Lockstep, seen: Observation) -> IntArray:
        return chosen_by(network, worlds, graphs_of(worlds, seen), device=device, rng=rng)

    return choose


def chosen_by(
    network: HanNetwork,
    worlds: Lockstep,
    graphs: GraphStore,
    *,
    device: str = "cpu",
    rng: np.random.Generator | None = None,
) -> IntArray:
    """(G,) endpoints of the worlds, or `REJECTED`."""
    rejects = torch.tensor([world.may_reject for world in worlds.worlds])
    with torch.no_grad():
        out = network(graphs.batch(np.arange(len(graphs))).to(device))
        valid = out.valid.cpu()
        size = valid.shape[1] - 1
        # Where nothing is eligible, rejection is all there is.
        valid[:, -1] &= rejects | ~valid[:, :-1].any(dim=1)
        if rng is None:
            picked = out.q.cpu().masked_fill(~valid, -torch.inf).argmax(dim=1).numpy()
        else:
            lots = torch.from_numpy(rng.gumbel(size=valid.shape)).float()
            logits = out.logits.cpu().masked_fill(~valid, -torch.inf)
            picked = (logits + lots).argmax(dim=1).numpy()
    return np.where(picked == size, REJECTED, picked)
