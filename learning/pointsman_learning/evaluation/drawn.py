"""Pools never seen in training: each seed of an evaluation draws its own. Ours."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np

from pointsman_core.workload import WorkloadError
from pointsman_learning.workloads import (
    BOARDS,
    SMALL_SHARE,
    UNSEEN_BOARDS,
    Board,
    Pool,
    random_pool,
)

SITE: Final = "edge-site"
"""As a pool: no drawing, the site itself."""
RANDOM: Final = "random"
UNSEEN: Final = "unseen-boards"
BOARD_SETS: Final[Mapping[str, tuple[Board, ...]]] = {RANDOM: BOARDS, UNSEEN: UNSEEN_BOARDS}
"""By kind of pool: what experts stand on."""
MOST_ENDPOINTS: Final = 254
"""As many addresses as a random pool has."""
STREAM: Final = 97
"""Keeps these draws apart from all others: training, tuning and scenarios have streams of other
numbers, so no pool of an evaluation was ever drawn in training, whatever the seeds."""

_GRAMMAR = re.compile(r"(?P<kind>[a-z-]+):(?P<least>\d{1,6})(-(?P<most>\d{1,6}))?")


@dataclass(frozen=True, slots=True)
class DrawnPools:
    """A kind of random pool, one for each seed."""

    kind: str
    """`RANDOM` or `UNSEEN`."""
    least: int
    """Endpoints."""
    most: int
    """Endpoints; each seed draws its number evenly between the two."""

    @classmethod
    def parse(cls, text: str) -> "DrawnPools | None":
        """Read ``random:24``, ``random:20-32`` or ``unseen-boards:8``; None for `SITE`.

        Raises WorkloadError for anything else.
        """
        folded = text.strip().casefold()
        if folded == SITE:
            return None
        found = _GRAMMAR.fullmatch(folded)
        if found is None or found["kind"] not in BOARD_SETS:
            raise WorkloadError(
                f"must be {SITE}, {RANDOM}:N, {UNSEEN}:N or a range like {RANDOM}:20-32"
                f" (got {text!r})",
                source="pool",
            )
        least = int(found["least"])
        most = least if found["most"] is None else int(found["most"])
        if not 2 <= least <= most <= MOST_ENDPOINTS:
            raise WorkloadError(
                f"must have 2 to {MOST_ENDPOINTS} endpoints, the least first (got {text!r})",
                source="pool",
            )
        return cls(found["kind"], least, most)

    @property
    def name(self) -> str:
        """As it is written."""
        return f"{self.kind}:{self.least}" + ("" if self.fixed else f"-{self.most}")

    @property
    def fixed(self) -> bool:
        """Whether all pools have the same number of endpoints."""
        return self.least == self.most

    def draw(self, seed: int) -> Pool:
        """Draw the pool of that seed; equal seeds give equal pools."""
        return _draw(self, seed)

    def setting(self) -> dict[str, Any]:
        """For the files, in place of what they say of a site."""
        count = self.least if self.fixed else f"{self.least} to {self.most}"
        return {
            "site": self.name,
            "policy": self.draw(0).snapshot.full_name,
            "endpoints": count,
            "experts": count,
            "pool": {
                "kind": self.kind,
                "boards": [board.name for board in BOARD_SETS[self.kind]],
                "small_share": SMALL_SHARE,
            },
        }


@lru_cache(maxsize=8)
def _draw(pools: DrawnPools, seed: int) -> Pool:
    rng = np.random.default_rng([seed, STREAM])
    count = pools.least if pools.fixed else int(rng.integers(pools.least, pools.most + 1))
    boards = BOARD_SETS[pools.kind]
    return random_pool(rng, count, small_share=SMALL_SHARE, boards=boards)
