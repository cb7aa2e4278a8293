"""Live state: which requests are where, and what the engines last said of themselves.

The server's own in-flight table is the first source, for it is right at once; engines'
gauges lag by seconds (vllm issue 49538) and only add what the table cannot know: load
that did not come through Pointsman, and the use of the KV cache. All times are seconds
on one monotonic clock of the caller's. Not thread-safe: one event loop owns it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pointsman_core.records import record

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

GAUGES_STALE_AFTER_S = 5.0
"""Gauges older than this are ignored (ours; engines refresh within about a second)."""

SURPLUS_AFTER_S = 15.0
"""An engine must show fewer requests than the table for this long before it is believed.

Ours; its gauges may lag by seconds, and a request just sent is not in them yet.
"""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine's metrics page says of its load."""

    running: int
    waiting: int
    kv_usage: float | None = None
    """Share of the KV cache in use, 0 to 1; None where the engine does not tell."""
    prompt_tokens_total: int | None = None
    """Prompt tokens processed since the engine started."""
    generation_tokens_total: int | None = None
    """Tokens generated since the engine started."""


@record
class Admitted:
    """What is known of a request when it is put on an endpoint."""

    arrival_s: float
    prompt_tokens: float
    expected_output_tokens: float
    limit_s: float
    """Limit of its latency per token, in seconds."""
    quality: float
    """Predicted quality of its answer."""
    streams: bool = True
    """Whether its tokens are seen as they come."""


@dataclass(slots=True)
class Residents:
    """The in-flight table as columns, one entry per request, all of length R."""

    row: IntArray
    """(R,) endpoint row of `LiveState`."""
    arrival_s: FloatArray
    prompt_tokens: FloatArray
    expected_output_tokens: FloatArray
    output_tokens: FloatArray
    """(R,) tokens seen so far; 0 means still waiting or in prefill."""
    streams: FloatArray
    """(R,) 1 where tokens are seen as they come, 0 where the answer comes whole."""
    limit_s: FloatArray
    quality: FloatArray

    @classmethod
    def empty(cls, capacity: int) -> "Residents":
        """Columns of zeros."""
        columns = {f.name: np.zeros(capacity) for f in fields(cls) if f.name != "row"}
        return cls(row=np.zeros(capacity, np.int64), **columns)

    def columns(self) -> Iterator[tuple[str, FloatArray | IntArray]]:
        """Name and array of each column."""
        return ((f.name, getattr(self, f.name)) for f in fields(self))

    def head(self, count: int) -> "Residents":
        """Views of the first ``count`` entries."""
        # Named one by one: this is asked at every decision.
        return Residents(
            self.row[:count],
            self.arrival_s[:count],
            self.prompt_tokens[:count],
            self.expected_output_tokens[:count],
            self.output_tokens[:count],
            self.streams[:count],
            self.limit_s[:count],
            self.quality[:count],
        )

    def grown(self) -> "Residents":
        """A copy with twice the capacity."""
        return Residents(
            **{name: np.concatenate([a, np.zeros_like(a)]) for name, a in self.columns()}
        )

    def copy_entry(self, source: int, target: int) -> None:
        """Overwrite entry ``target`` by entry ``source``."""
        for _, array in self.columns():
            array[target] = array[source]


class StateView(Protocol):
    """What deciding reads of live state; `LiveState` has it, and so has the simulator."""

    def row(self, address: str) -> int:
        """Row of an endpoint."""
        ...

    def ready(self) -> BoolArray:
        """(rows,) endpoints that may be chosen."""
        ...

    def foreign(self, *, now_s: float) -> FloatArray:
        """(rows,) requests that an engine has beyond ours."""
        ...

    def kv_usage(self, *, now_s: float) -> FloatArray:
        """(rows,) share of the KV cache in use, NaN where unknown or stale."""
        ...

    def residents(self) -> Residents:
        """All requests in flight; valid until the next change."""
        ...


@record
class _Gauges:
    """What the gauges tell, for as long as none comes or goes stale."""

    since_s: float
    oldest_s: float
    """When the oldest of the fresh ones were read."""
    foreign: FloatArray
    kv_usage: FloatArray

    def hold(self, now_s: float) -> bool:
        """Whether the same ones are fresh now."""
        return self.since_s <= now_s and now_s - self.oldest_s <= GAUGES_STALE_AFTER_S


class LiveState:
    """The in-flight table and the endpoints' gauges.

    Endpoints have *rows*: small integers that stay the same while the endpoint is known,
    so that arrays over rows need no dictionary look-up per decision.
    """

    def __init__(self) -> None:
        self._row_of: dict[str, int] = {}
        self._free_rows: list[int] = []
        self._left: set[str] = set()
        self._ready = np.zeros(0, np.bool_)
        self._paused = np.zeros(0, np.bool_)
        self._foreign = np.zeros((2, 0))  # by the last scrape but one, and by the last
        self._kv_usage = np.zeros(0)
        self._gauges_at = np.zeros(0)
        self._known_gauges: _Gauges | None = None
        self._loads: dict[str, EngineLoad] = {}
        self._surplus: dict[str, tuple[float, int]] = {}
        self._entry_of: dict[str, int] = {}
        self._ids: list[str] = []
        self._residents = Residents.empty(256)

    # --- endpoints ---------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """Number of endpoint rows, free ones included."""
        return len(self._ready)

    @property
    def addresses(self) -> tuple[str, ...]:
        """All known endpoints."""
        return tuple(self._row_of)

    def set_endpoints(self, addresses: Iterable[str]) -> None:
        """Make exactly these endpoints known; new ones start ready.

        An endpoint that left keeps its row while requests are still on it; when it comes
        back it starts anew.
        """
        wanted = dict.fromkeys(addresses)
        occupied = set(self.residents().row.tolist())
        for address, row in list(self._row_of.items()):
            if address in wanted:
                continue
            self._ready[row] = self._paused[row] = False
            self._left.add(address)
            if row not in occupied:
                del self._row_of[address]
                self._left.discard(address)
                self._loads.pop(address, None)
                self._surplus.pop(address, None)
                self._free_rows.append(row)
        for address in wanted:
            if address not in self._row_of:
                self._add_endpoint(address)
            elif address in self._left:
                self._left.discard(address)
                self._ready[self._row_of[address]] = True

    def _add_endpoint(self, address: str) -> None:
        if not self._free_rows:
            self._free_rows.append(self.rows)
            self._ready = np.append(self._ready, False)
            self._paused = np.append(self._paused, False)
            self._foreign = np.hstack([self._foreign, np.zeros((2, 1))])
            self._kv_usage = np.append(self._kv_usage, np.nan)
            self._gauges_at = np.append(self._gauges_at, -np.inf)
        row = self._free_rows.pop()
        self._row_of[address] = row
        self._ready[row] = True
        self._paused[row] = False
        self._foreign[:, row] = 0.0
        self._kv_usage[row] = np.nan
        self._gauges_at[row] = -np.inf
        self._known_gauges = None

    def row(self, address: str) -> int:
        """Row of an endpoint.

        Raises:
            KeyError: the endpoint is not known.

        """
        return self._row_of[address]

    def set_ready(self, address: str, *, ready: bool) -> bool:
        """Mark an endpoint; returns whether that changed anything. Unknown ones are ignored."""
        row = self._row_of.get(address)
        if row is None or self._ready[row] == ready:
            return False
        self._ready[row] = ready
        return True

    def is_ready(self, address: str) -> bool:
        """Whether the endpoint is known and ready."""
        row = self._row_of.get(address)
        return row is not None and bool(self._ready[row])

    def set_paused(self, address: str, *, paused: bool) -> None:
        """Keep an endpoint out of decisions, ready or not. Unknown ones are ignored."""
        row = self._row_of.get(address)
        if row is not None:
            self._paused[row] = paused

    def is_paused(self, address: str) -> bool:
        """Whether the endpoint is known and kept out of decisions."""
        row = self._row_of.get(address)
        return row is not None and bool(self._paused[row])

    def set_load(self, address: str, load: EngineLoad, *, now_s: float) -> None:
        """Take in freshly scraped gauges."""
        row = self._row_of.get(address)
        if row is None:
            return
        own = self.in_flight(address)
        self._note_surplus(address, own - load.running - load.waiting, now_s)
        self._foreign[0, row] = self._foreign[1, row]
        self._foreign[1, row] = max(0, load.running + load.waiting - own)
        self._kv_usage[row] = np.nan if load.kv_usage is None else load.kv_usage
        self._gauges_at[row] = now_s
        self._known_gauges = None
        self._loads[address] = load

    def _note_surplus(self, address: str, surplus: int, now_s: float) -> None:
        if surplus <= 0:
            self._surplus.pop(address, None)
            return
        since, least = self._surplus.get(address, (now_s, surplus))
        self._surplus[address] = (since, min(least, surplus))

    def surplus(self, address: str, *, now_s: float) -> int:
        """Requests in the table that the engine has not had for `SURPLUS_AFTER_S`.

        The least difference in that time; 0 where the gauges are stale.
        """
        row = self._row_of.get(address)
        if row is None or now_s - self._gauges_at[row] > GAUGES_STALE_AFTER_S:
            return 0
        since, least = self._surplus.get(address, (now_s, 0))
        return least if now_s - since >= SURPLUS_AFTER_S else 0

    def load(self, address: str) -> EngineLoad | None:
        """The gauges as last scraped, however old; None before the first."""
        return self._loads.get(address)

    def ready(self) -> BoolArray:
        """(rows,) endpoints that may be chosen."""
        return self._ready & ~self._paused

    def foreign(self, *, now_s: float) -> FloatArray:
        """(rows,) requests that an engine has beyond ours.

        The smaller of the last two scrapes, since a request that just ended here may still
        be counted there; zero when the gauges are stale.
        """
        return self._gauges(now_s).foreign

    def kv_usage(self, *, now_s: float) -> FloatArray:
        """(rows,) share of the KV cache in use, NaN where unknown or stale."""
        return self._gauges(now_s).kv_usage

    def _gauges(self, now_s: float) -> _Gauges:
        """Both, worked out anew only once gauges came or some went stale."""
        known = self._known_gauges
        if known is None or not known.hold(now_s):
            fresh = now_s - self._gauges_at <= GAUGES_STALE_AFTER_S
            known = self._known_gauges = _Gauges(
                since_s=now_s,
                oldest_s=float(self._gauges_at[fresh].min(initial=np.inf)),
                foreign=np.where(fresh, np.minimum(self._foreign[0], self._foreign[1]), 0.0),
                kv_usage=np.where(fresh, self._kv_usage, np.nan),
            )
        return known

    # --- requests ----------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._entry_of

    def in_flight(self, address: str) -> int:
        """Requests of ours on one endpoint."""
        row = self._row_of.get(address)
        return 0 if row is None else int(np.count_nonzero(self.residents().row == row))

    def residents(self) -> Residents:
        """Views of the table's live part; valid until the next change."""
        return self._residents.head(len(self._ids))

    def begin(self, request_id: str, address: str, request: Admitted) -> None:
        """Put a request on an endpoint.

        Raises:
            KeyError: the endpoint is not known.
            ValueError: the request is in the table already.

        """
        row = self._row_of[address]
        if request_id in self._entry_of:
            raise ValueError(f"request {request_id} is in flight already")
        entry = len(self._ids)
        if entry == len(self._residents.row):
            self._residents = self._residents.grown()
        self._ids.append(request_id)
        self._entry_of[request_id] = entry
        table = self._residents
        table.row[entry] = row
        table.arrival_s[entry] = request.arrival_s
        table.prompt_tokens[entry] = request.prompt_tokens
        table.expected_output_tokens[entry] = request.expected_output_tokens
        table.output_tokens[entry] = 0.0
        table.streams[entry] = request.streams
        table.limit_s[entry] = request.limit_s
        table.quality[entry] = request.quality

    def add_tokens(self, request_id: str, count: int) -> None:
        """Count tokens of an answer; unknown requests are ignored."""
        entry = self._entry_of.get(request_id)
        if entry is not None:
            self._residents.output_tokens[entry] += count

    def move(self, request_id: str, address: str) -> bool:
        """Note that another endpoint serves the request; returns whether that was news."""
        entry, row = self._entry_of.get(request_id), self._row_of.get(address)
        if entry is None or row is None or self._residents.row[entry] == row:
            return False
        self._residents.row[entry] = row
        return True

    def finish(self, request_id: str) -> bool:
        """Take a request out; returns whether it was in."""
        entry = self._entry_of.pop(request_id, None)
        if entry is None:
            return False
        last = self._ids.pop()
        if last != request_id:
            self._residents.copy_entry(len(self._ids), entry)
            self._ids[entry] = last
            self._entry_of[last] = entry
        return True
