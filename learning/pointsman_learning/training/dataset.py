"""Labelled states as graphs and targets, ready to be drawn in batches."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import ConfigDict
from torch import Tensor

from pointsman_core.graph import encode
from pointsman_core.state import BoolArray, FloatArray, IntArray
from pointsman_learning.han import GraphStore, PaddedBatch
from pointsman_learning.training.shards import Shard

OWN = 0
"""Column of a shard's labels that is known where any is; see `Credit.weights` for the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """How the parts of a label are added up: the tailored reward of a decision."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    discount: float = 0.98
    """Per decision, of what later requests gain or lose."""
    own_only: bool = False
    """The plain reward: the new request's own QoS and nothing else (an ablation)."""

    def weights(self, bins: Sequence[int]) -> FloatArray:
        """(2 + bins,) of own, present, and later requests by bin."""
        if self.own_only:
            return np.array([1.0, 0.0] + [0.0] * len(bins))
        starts = (0, *bins[:-1])
        middle = [(start + 1 + end) / 2 for start, end in zip(starts, bins, strict=True)]
        return np.array([1.0, 1.0] + [self.discount**steps for steps in middle])


@dataclass(frozen=True, slots=True)
class Batch:
    """B states; E padded as in ``graphs``."""

    graphs: PaddedBatch
    value: Tensor
    """(B, E + 1) QoS that each action gains over rejection, 0 where unknown"""
    full: Tensor
    """(B, E + 1) the same without discount"""
    known: Tensor
    """(B, E + 1) bool"""
    may_reject: Tensor
    """(B,) bool"""
    chosen: Tensor
    """(B,) the base policy's action, E standing for rejection"""
    quiet: Tensor
    """(B, E, 2) in time, change of the QoS of those there; without later arrivals"""

    def to(self, device: str) -> "Batch":
        """The same on a device."""
        return Batch(*(getattr(self, f.name).to(device) for f in fields(self)))

    @property
    def allowed(self) -> Tensor:
        """(B, E + 1) actions that the policy may choose."""
        allowed = self.known.clone()
        allowed[:, -1] &= self.may_reject
        return allowed


class LabelledStates:
    """All states of some shards."""

    def __init__(self, shards: Iterable[Shard], credit: Credit) -> None:
        found = list(shards)
        if not found:
            raise ValueError("there are no labels to learn from")
        if len({shard.bins for shard in found}) != 1:
            raise ValueError("the labels were made with different horizons")
        self.credit = credit
        self.bins = found[0].bins
        self.graphs = GraphStore.of(
            [encode(shard.observation(i)) for shard in found for i in range(len(shard))]
        )
        self.labels = np.concatenate([shard.labels for shard in found])
        self.quiet = np.concatenate([shard.quiet for shard in found])
        self.may_reject: BoolArray = np.concatenate([shard.may_reject for shard in found])
        self.chosen: IntArray = np.concatenate([shard.chosen for shard in found])
        self.info: list[dict[str, Any]] = [one for shard in found for one in shard.info]
        self._start = self.graphs.starts[0]

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def label_count(self) -> int:
        """State-action pairs."""
        return int(np.isfinite(self.labels[:, OWN]).sum())

    def batch(self, numbers: IntArray) -> Batch:
        """States by number."""
        graphs = self.graphs.batch(numbers)
        size = graphs.eligible.shape[1]
        sizes = self._start[numbers + 1] - self._start[numbers]
        parts = np.full((len(numbers), size + 1, self.labels.shape[1]), np.nan, np.float32)
        quiet = np.full((len(numbers), size, 2), np.nan, np.float32)
        for row, (number, count) in enumerate(zip(numbers.tolist(), sizes.tolist(), strict=True)):
            start = int(self._start[number])
            first = start + number  # one row more for each state before
            parts[row, :count] = self.labels[first : first + count]
            parts[row, size] = self.labels[first + count]
            quiet[row, :count] = self.quiet[start : start + count]
        known = np.isfinite(parts[..., OWN])
        parts = np.nan_to_num(parts)
        weights = self.credit.weights(self.bins).astype(np.float32)
        chosen = np.where(self.chosen[numbers] == sizes, size, self.chosen[numbers])
        return Batch(
            graphs=graphs,
            value=torch.from_numpy(parts @ weights),
            full=torch.from_numpy(parts.sum(axis=-1)),
            known=torch.from_numpy(known),
            may_reject=torch.from_numpy(self.may_reject[numbers]),
            chosen=torch.from_numpy(chosen),
            quiet=torch.from_numpy(np.nan_to_num(quiet)),
        )
