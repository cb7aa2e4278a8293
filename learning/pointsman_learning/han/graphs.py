"""Many graphs of different sizes: stored without padding, batched with it, or as HeteroData.

A batch has B graphs, padded to E endpoints, R1 running and R2 waiting requests. Padded
endpoints are not eligible and padded requests are on endpoint -1, so that nothing of them
reaches a real one: an answer does not depend on a graph's batch-mates.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import numpy as np
import torch
from torch import Tensor

from pointsman_core.graph import Float32Array, GraphArrays, schema_hash
from pointsman_core.state import BoolArray, IntArray

if TYPE_CHECKING:
    from torch_geometric.data import HeteroData

RELATIONS: Final = (
    ("running", "runs_on", "endpoint"),
    ("waiting", "waits_at", "endpoint"),
    ("request", "may_go_to", "endpoint"),
    ("endpoint", "may_take", "request"),
)
"""Node type, relation, node type."""

NOWHERE: Final = -1
"""Endpoint of a padded request."""


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """B graphs as tensors."""

    request: Tensor
    """(B, F_r)"""
    endpoint: Tensor
    """(B, E, F_e)"""
    eligible: Tensor
    """(B, E) bool"""
    analytic: Tensor
    """(B, E, 3) ImpactGreedy's chance in time, impact on those there, and value."""
    running: Tensor
    """(B, R1, F_q)"""
    running_endpoint: Tensor
    """(B, R1) int64, `NOWHERE` where padded"""
    waiting: Tensor
    """(B, R2, F_q)"""
    waiting_endpoint: Tensor
    """(B, R2) int64"""

    def __len__(self) -> int:
        return len(self.request)

    def to(self, device: torch.device | str) -> "PaddedBatch":
        """The same on a device."""
        return PaddedBatch(*(getattr(self, f.name).to(device) for f in fields(self)))


@dataclass(frozen=True, slots=True, eq=False)
class GraphStore:
    """N graphs one after the other, without padding."""

    request: Float32Array
    """(N, F_r)"""
    endpoint: Float32Array
    """(sum of E, F_e)"""
    eligible: BoolArray
    """(sum of E,)"""
    analytic: Float32Array
    """(sum of E, 3)"""
    running: Float32Array
    """(sum of R1, F_q)"""
    running_endpoint: IntArray
    """(sum of R1,) within its graph."""
    waiting: Float32Array
    """(sum of R2, F_q)"""
    waiting_endpoint: IntArray
    """(sum of R2,)"""
    starts: IntArray
    """(3, N + 1) where each graph's endpoints, running and waiting requests start."""

    @classmethod
    def of(cls, graphs: Iterable[GraphArrays]) -> Self:
        """Gather graphs; those encoded in groups are taken apart.

        Raises:
            ValueError: there are none.

        """
        parts = [part for graph in graphs for part in graph.split()]
        if not parts:
            raise ValueError("a store needs at least one graph")
        sizes = [(len(g.endpoint), len(g.running), len(g.waiting)) for g in parts]
        columns = (f.name for f in fields(cls) if f.name != "starts")
        return cls(
            **{name: np.concatenate([getattr(g, name) for g in parts]) for name in columns},
            starts=np.vstack([np.zeros(3, np.int64), np.cumsum(sizes, axis=0)]).T,
        )

    @classmethod
    def join(cls, stores: Sequence[Self]) -> Self:
        """All graphs of several stores, in order."""
        columns = [f.name for f in fields(cls) if f.name != "starts"]
        sizes = np.concatenate([np.diff(store.starts, axis=1) for store in stores], axis=1)
        starts = np.hstack([np.zeros((3, 1), np.int64), np.cumsum(sizes, axis=1)])
        joined = {name: np.concatenate([getattr(s, name) for s in stores]) for name in columns}
        return cls(**joined, starts=starts)

    def __len__(self) -> int:
        return len(self.request)

    def batch(self, numbers: IntArray | Sequence[int]) -> PaddedBatch:
        """Graphs by number as padded tensors on the CPU; B of them in the order given."""
        chosen = np.asarray(numbers, np.int64)
        endpoints, running, waiting = (_Padding.of(s, chosen) for s in self.starts)
        return PaddedBatch(
            request=torch.from_numpy(self.request[chosen]),
            endpoint=endpoints.pad(self.endpoint),
            eligible=endpoints.pad(self.eligible),
            analytic=endpoints.pad(self.analytic),
            running=running.pad(self.running),
            running_endpoint=running.pad(self.running_endpoint, fill=NOWHERE),
            waiting=waiting.pad(self.waiting),
            waiting_endpoint=waiting.pad(self.waiting_endpoint, fill=NOWHERE),
        )

    def graph(self, number: int) -> GraphArrays:
        """One graph."""
        e, r, w = (slice(*s[number : number + 2]) for s in self.starts)
        return GraphArrays(
            request=self.request[number : number + 1],
            endpoint=self.endpoint[e],
            running=self.running[r],
            waiting=self.waiting[w],
            running_endpoint=self.running_endpoint[r],
            waiting_endpoint=self.waiting_endpoint[w],
            eligible=self.eligible[e],
            analytic=self.analytic[e],
        )

    def save(self, path: Path) -> None:
        """Write an uncompressed .npz file."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        with path.open("wb") as file:
            np.savez(file, schema=np.array(schema_hash()), **columns)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no store, or its features are those of another release.

        """
        with np.load(path) as file:
            if "schema" not in file:
                raise ValueError(f"{path} holds no graphs")
            if str(file["schema"]) != schema_hash():
                raise ValueError(f"{path} was written with other features: make it anew")
            return cls(**{f.name: file[f.name] for f in fields(cls)})


@dataclass(frozen=True, slots=True)
class _Padding:
    """Where the rows of some graphs are, and where they belong in a padded batch."""

    sizes: IntArray
    source: IntArray
    target: tuple[IntArray, IntArray]

    @classmethod
    def of(cls, starts: IntArray, chosen: IntArray) -> Self:
        sizes = starts[chosen + 1] - starts[chosen]
        graph = np.repeat(np.arange(len(chosen)), sizes)
        place = np.arange(len(graph)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return cls(sizes, starts[chosen][graph] + place, (graph, place))

    def pad(self, rows: Float32Array | IntArray | BoolArray, *, fill: int = 0) -> Tensor:
        shape = (len(self.sizes), int(self.sizes.max(initial=0)), *rows.shape[1:])
        padded = np.full(shape, fill, rows.dtype)
        padded[self.target] = rows[self.source]
        return torch.from_numpy(padded)


def only_eligible(graph: GraphArrays) -> GraphArrays:
    """The graph without endpoints that cannot be chosen, and without the requests on them."""
    number = np.where(graph.eligible, np.cumsum(graph.eligible) - 1, NOWHERE)
    running, waiting = number[graph.running_endpoint], number[graph.waiting_endpoint]
    runs, waits = running != NOWHERE, waiting != NOWHERE
    return replace(
        graph,
        endpoint=graph.endpoint[graph.eligible],
        analytic=graph.analytic[graph.eligible],
        eligible=graph.eligible[graph.eligible],
        running=graph.running[runs],
        waiting=graph.waiting[waits],
        running_endpoint=running[runs],
        waiting_endpoint=waiting[waits],
    )


def to_hetero(graphs: Sequence[GraphArrays]) -> "HeteroData":
    """One PyG batch of graphs; holds only what `only_eligible` leaves of each."""
    from torch_geometric.data import Batch

    batch: HeteroData = Batch.from_data_list([_hetero(only_eligible(g)) for g in graphs])
    return batch


def _hetero(graph: GraphArrays) -> "HeteroData":
    from torch_geometric.data import HeteroData

    data = HeteroData()
    for kind in ("request", "endpoint", "running", "waiting"):
        data[kind].x = torch.from_numpy(np.ascontiguousarray(getattr(graph, kind)))
    data["endpoint"].analytic = torch.from_numpy(np.ascontiguousarray(graph.analytic))
    endpoints = torch.arange(len(graph.endpoint))
    request = torch.zeros_like(endpoints)
    for relation in RELATIONS:
        source, _, target = relation
        if source == "request":
            edges = torch.stack([request, endpoints])
        elif target == "request":
            edges = torch.stack([endpoints, request])
        else:
            where = torch.from_numpy(getattr(graph, f"{source}_endpoint"))
            edges = torch.stack([torch.arange(len(where)), where])
        data[relation].edge_index = edges
    return data
