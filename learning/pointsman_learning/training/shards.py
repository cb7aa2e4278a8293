"""Labelled states on disk: one ``.npz`` file per shard.

What is kept is the `Observation` and not what a model makes of it, so that features may change
without labelling anew. Numbers are 32-bit: a shard of 2,000 states takes about a megabyte.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from pointsman_core.observation import CostColumns, Observation
from pointsman_core.state import BoolArray, FloatArray, IntArray
from pointsman_learning.predictors.cache import write_whole
from pointsman_learning.training.rollouts import State

FORMAT = 1
_ENDPOINT = ("quality", "output_tokens", "foreign", "kv_usage")
_RESIDENT = (
    "resident_elapsed_s",
    "resident_prompt_tokens",
    "resident_expected_output",
    "resident_output_tokens",
    "resident_limit_s",
    "resident_quality",
)
_COST = tuple(f.name for f in fields(CostColumns))


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """S states as flat arrays: C endpoints and R requests in flight of all states together."""

    request: FloatArray
    """(S, 3) prompt tokens, limit, limit of the first token."""
    may_reject: BoolArray
    """(S,)"""
    chosen: IntArray
    """(S,) the base policy's action; the number of endpoints stands for rejection."""
    endpoint_start: IntArray
    """(S + 1,) first endpoint of each state; its actions start at this plus its number."""
    resident_start: IntArray
    """(S + 1,)"""
    eligible: BoolArray
    """(C,)"""
    endpoint: FloatArray
    """(C, 4 + 7) what `Observation` says of endpoints, and their cost models."""
    quiet: FloatArray
    """(C, 2) in time, change of the QoS of those there; without later arrivals."""
    resident_candidate: IntArray
    """(R,)"""
    resident: FloatArray
    """(R, 6)"""
    labels: FloatArray
    """(C + S, 2 + bins) own, present, later; the last row of a state is for rejection."""
    bins: tuple[int, ...]
    info: tuple[dict[str, Any], ...]
    """(S,) where each state comes from."""

    def __len__(self) -> int:
        return len(self.chosen)

    def observation(self, state: int) -> Observation:
        """What the router saw."""
        own = slice(self.endpoint_start[state], self.endpoint_start[state + 1])
        there = slice(self.resident_start[state], self.resident_start[state + 1])
        columns = np.ascontiguousarray(self.endpoint[own].T, np.float64)
        residents = np.ascontiguousarray(self.resident[there].T, np.float64)
        prompt, limit, first = self.request[state].tolist()
        return Observation(
            prompt_tokens=prompt,
            waited_s=0.0,
            limit_s=limit,
            first_token_limit_s=first,
            eligible=self.eligible[own],
            cost=CostColumns(*columns[len(_ENDPOINT) :]),
            resident_candidate=self.resident_candidate[there].astype(np.int64),
            learned=np.ones(columns.shape[1], np.bool_),
            **dict(zip(_ENDPOINT, columns, strict=False)),
            **dict(zip(_RESIDENT, residents, strict=True)),
        )

    def labels_of(self, state: int) -> FloatArray:
        """(E + 1, 2 + bins)."""
        start = self.endpoint_start[state] + state  # one row more for each state before
        stop = self.endpoint_start[state + 1] + state + 1
        return self.labels[start:stop]

    def quiet_of(self, state: int) -> FloatArray:
        """(E, 2)."""
        return self.quiet[self.endpoint_start[state] : self.endpoint_start[state + 1]]

    def save(self, file: Path) -> None:
        """Write it whole or not at all."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "info"}
        arrays["info"] = np.frombuffer(json.dumps(self.info).encode(), np.uint8)
        write_whole(file, lambda stream: np.savez_compressed(stream, format=FORMAT, **arrays))

    @classmethod
    def load(cls, file: Path) -> "Shard":
        """Read one.

        Raises:
            ValueError: it is damaged or of another format; the message names it.

        """
        try:
            with np.load(file, allow_pickle=False) as kept:
                written = int(kept["format"])
                found = {f.name: kept[f.name] for f in fields(cls)} if written == FORMAT else {}
        except (OSError, KeyError, EOFError, ValueError) as error:
            raise ValueError(f"{file} is no shard of labels: {error}") from error
        if not found:
            raise ValueError(f"{file} is of another format: make the labels anew")
        found["info"] = tuple(json.loads(found["info"].tobytes()))
        found["bins"] = tuple(found["bins"].tolist())
        return cls(**found)

    @classmethod
    def of(cls, states: Sequence[State], bins: Sequence[int]) -> "Shard":
        """Pack states."""
        seen = [state.seen for state in states]
        sizes = [len(one.quality) for one in seen]
        endpoint = [
            np.stack(
                [getattr(one, name) for name in _ENDPOINT]
                + [getattr(one.cost, name) for name in _COST],
                axis=1,
            )
            for one in seen
        ]
        resident = [np.stack([getattr(one, n) for n in _RESIDENT], axis=1) for one in seen]
        labels = [np.column_stack((s.own, s.present, s.later)) for s in states]
        quiet = [np.column_stack((s.quiet_in_time, s.quiet_present)) for s in states]
        small = np.float32
        return cls(
            request=np.array([[o.prompt_tokens, o.limit_s, o.first_token_limit_s] for o in seen]),
            may_reject=np.array([state.may_reject for state in states]),
            chosen=np.array([state.chosen for state in states]),
            endpoint_start=np.concatenate(([0], np.cumsum(sizes))),
            resident_start=np.concatenate(([0], np.cumsum([len(one) for one in resident]))),
            eligible=np.concatenate([one.eligible for one in seen]),
            endpoint=np.concatenate(endpoint).astype(small),
            quiet=np.concatenate(quiet).astype(small),
            resident_candidate=np.concatenate([o.resident_candidate for o in seen]).astype(
                np.int16
            ),
            resident=np.concatenate(resident).astype(small),
            labels=np.concatenate(labels).astype(small),
            bins=tuple(bins),
            info=tuple(_info(state) for state in states),
        )


def _info(state: State) -> dict[str, Any]:
    drawn = state.drawn
    if drawn is None:
        return {}
    return {
        "process": drawn.process,
        "load": round(drawn.load, 3),
        "limits": drawn.limits,
        "pool": drawn.pool,
        "seed": drawn.scenario.seed,
    }


def load_all(folder: Path) -> Iterator[Shard]:
    """All shards of a folder, in order of their names."""
    for file in sorted(folder.glob("*.npz")):
        yield Shard.load(file)
