"""When requests arrive and how long they are: processes, and held-out windows of traces.

A trace is divided by time: its first part is for training, then after a gap comes the
validation part, and after another gap the test part; every window lies within one part.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

import numpy as np

from pointsman_common.data_folder import TRACES
from pointsman_core.state import FloatArray, IntArray
from pointsman_core.workload import (
    INPUT_TOKENS,
    OUTPUT_TOKENS,
    Arrivals,
    WorkloadError,
    parse_arrivals,
)
from pointsman_learning.workloads.corpus import Split, check_split
from pointsman_learning.workloads.folder import DataFolder, read_text


class Process(StrEnum):
    """The arrival processes that have a name."""

    POISSON = "poisson"
    ON_OFF = "on-off"
    AZURE_CONV = "azure-conv"
    AZURE_CODE = "azure-code"


GAP_S = 60.0
"""Seconds of a trace between two parts that belong to neither. Ours."""
PARTS: dict[Split, tuple[float, float]] = {
    "train": (0.0, 0.4),
    "validation": (0.4, 0.55),
    "test": (0.55, 1.0),
}
"""Share of a trace's duration at which each part begins and ends, gaps included. Ours."""

DRAWN_SIZES = 16_384
"""Pairs of synthetic sizes, where no trace is at hand."""
_TRAIN: Split = "train"
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


@dataclass(frozen=True, slots=True)
class OnOff:
    """A Markov-modulated Poisson process of two states with exponential stays. Ours.

    With the defaults a quarter of the time is "on", at 2.5 times the mean rate; "off" has
    half the mean rate.
    """

    on_s: float = 10.0
    """Mean stay in "on", in seconds."""
    off_s: float = 30.0
    ratio: float = 5.0
    """Rate of "on" over rate of "off"."""

    def __post_init__(self) -> None:
        if not (self.on_s > 0 and self.off_s > 0 and self.ratio >= 1):
            raise WorkloadError(
                "stays must be above 0 s, and the ratio of rates at least 1", source="on-off"
            )

    def rates(self, mean: float) -> tuple[float, float]:
        """Rates of "on" and "off" that give the mean, all per second."""
        share = self.on_s / (self.on_s + self.off_s)
        off = mean / (1.0 + share * (self.ratio - 1.0))
        return self.ratio * off, off


@dataclass(frozen=True, slots=True, eq=False)
class Sizes:
    """(input, output) lengths that occur together, to draw from."""

    input_tokens: IntArray
    """(K,)"""
    output_tokens: IntArray
    """(K,) at least 1."""
    source: str

    def draw(self, rng: np.random.Generator, requests: int) -> tuple[IntArray, IntArray]:
        """Draw pairs with repeats."""
        row = rng.integers(len(self.input_tokens), size=requests)
        return self.input_tokens[row], self.output_tokens[row]

    @property
    def log_spread(self) -> float:
        """Standard deviation of the logarithm of output lengths."""
        return float(np.log(self.output_tokens).std())


@dataclass(frozen=True, slots=True)
class Window:
    """Requests as they arrive, before anything is known of their prompts."""

    seconds: FloatArray
    """(N,) ascending, from 0."""
    input_tokens: IntArray
    output_tokens: IntArray
    rate: float
    """Mean arrivals per second."""
    note: str
    """Which part of what it is, for the scenario's description."""


@dataclass(frozen=True, slots=True, eq=False)
class ArrivalProcess:
    """Arrivals of one split at any rate; a trace if ``trace`` is given."""

    name: str
    split: Split
    sizes: Sizes
    trace: Arrivals | None = None
    """The split's part of the trace."""
    on_off: OnOff | None = None
    known_sizes: Sizes | None = None
    """What a predictor of lengths may know: the training part's. None: ``sizes`` themselves."""

    def disjoint_windows(self, requests: int) -> int | None:
        """How many windows of that many requests do not overlap; None: no end of them."""
        return None if self.trace is None else len(self.trace) // requests

    def window(
        self,
        *,
        requests: int,
        rate: float | None,
        seed: int,
        rng: np.random.Generator,
        sizes_rng: np.random.Generator,
    ) -> Window:
        """Draw a window of a mean rate, in requests per second; None: a trace's own times.

        ``seed`` chooses a held-out trace's window, see `window_start`; all else is drawn from
        ``rng``, alike for every rate but for the time scale, and sizes from ``sizes_rng``.
        Windows of traces and of the on-off process have exactly that rate, since a few bursts
        more or less would otherwise be another load; Poisson arrivals vary as they do.
        """
        if requests < 1 or not (rate is None or (rate > 0 and math.isfinite(rate))):
            raise WorkloadError(
                f"needs at least 1 request at a rate above 0 (got {requests} at {rate}/s)",
                source=self.name,
            )
        if self.trace is not None:
            return self._trace_window(self.trace, requests=requests, rate=rate, seed=seed, rng=rng)
        if rate is None:
            raise WorkloadError(
                "has no times of its own: only a trace is replayed as recorded", source=self.name
            )
        moments = np.cumsum(rng.exponential(1.0, size=requests))
        if self.on_off is None:
            seconds, note = moments / rate, "Poisson arrivals"
        else:
            seconds = _modulated(moments, self.on_off, rate, rng)
            seconds = seconds * (requests / rate / seconds[-1])
            note = (
                f"on-off arrivals ({self.on_off.on_s:g} s at {self.on_off.ratio:g} times the rate"
                f" of {self.on_off.off_s:g} s, time-scaled)"
            )
        inputs, outputs = self.sizes.draw(sizes_rng, requests)
        note += f", sizes drawn from {self.sizes.source}"
        return Window(seconds - seconds[0], inputs, outputs, rate, note)

    def _trace_window(
        self,
        trace: Arrivals,
        *,
        requests: int,
        rate: float | None,
        seed: int,
        rng: np.random.Generator,
    ) -> Window:
        if requests > len(trace):
            raise WorkloadError(
                f"has only {len(trace)} requests, {requests} are wanted", source=trace.source
            )
        if self.split == "train":
            start = int(rng.integers(len(trace) - requests + 1))
            place = "drawn"
        else:
            start, overlaps = window_start(len(trace), requests=requests, seed=seed)
            place = "overlapping others" if overlaps else "disjoint from others"
        cut = trace.window(start=start, requests=requests, rate=rate)
        note = (
            f"arrivals and sizes of {trace.source}, window from request {start + 1}"
            f" ({place}; {self.disjoint_windows(requests)} disjoint ones exist),"
            f" {'as recorded' if rate is None else 'time-scaled'}"
        )
        outputs = np.maximum(cut.output_tokens, 1)
        own_rate = cut.rate if rate is None else rate
        return Window(cut.seconds, cut.input_tokens, outputs, own_rate, note)


def window_start(length: int, *, requests: int, seed: int) -> tuple[int, bool]:
    """First request of a held-out window, and whether it overlaps that of a smaller seed.

    The first ``length // requests`` seeds get disjoint windows in order of time; all others
    are spread evenly over all possible starts (multiples of the golden ratio).
    """
    if seed < length // requests:
        return seed * requests, False
    return math.floor((seed * _GOLDEN % 1.0) * (length - requests + 1)), True


def _modulated(
    moments: FloatArray, process: OnOff, rate: float, rng: np.random.Generator
) -> FloatArray:
    """Times at which the cumulated rate of the two states reaches ``moments``."""
    on_rate, off_rate = process.rates(rate)
    # The stationary start: stays are memoryless, so only the state must be drawn.
    first_on = rng.random() < process.on_s / (process.on_s + process.off_s)
    times, areas = [np.zeros(1)], [np.zeros(1)]
    while areas[-1][-1] < moments[-1]:
        stays = rng.exponential(1.0, size=(64, 2))
        order = (
            ((process.on_s, on_rate), (process.off_s, off_rate))
            if first_on
            else ((process.off_s, off_rate), (process.on_s, on_rate))
        )
        lengths = stays * [mean for mean, _ in order]
        gained = lengths * [own for _, own in order]
        times.append(times[-1][-1] + np.cumsum(lengths.ravel()))
        areas.append(areas[-1][-1] + np.cumsum(gained.ravel()))
    found: FloatArray = np.interp(moments, np.concatenate(areas), np.concatenate(times))
    return found


def arrival_process(
    name: str | Process,
    *,
    split: Split,
    on_off: OnOff | None = None,
    folder: DataFolder | None = None,
) -> ArrivalProcess:
    """The process of that name for one split.

    Poisson and on-off take their sizes from the conv trace's same split, or where there is no
    data folder from lognormal distributions near it. Raises WorkloadError for an unknown name,
    or a trace that is not there.
    """
    check_split(split)
    if name not in tuple(Process):
        known = ", ".join(Process)
        raise WorkloadError(f"must be one of {known} (got {str(name)!r})", source="process")
    found = folder or DataFolder.find()
    if name in TRACES:
        return _trace_process(str(name), split, str((found or DataFolder.require()).path))
    here = found is not None and found.has(TRACES["azure-conv"])

    def sizes(part: Split) -> Sizes:
        if found is not None and here:
            return _trace_process("azure-conv", part, str(found.path)).sizes
        return _synthetic_sizes(part)

    modulation = (on_off or OnOff()) if name == Process.ON_OFF else None
    return ArrivalProcess(
        str(name), split, sizes(split), on_off=modulation, known_sizes=sizes(_TRAIN)
    )


@lru_cache(maxsize=32)
def _trace_process(name: str, split: Split, path: str) -> ArrivalProcess:
    return _process_of(_trace(name, path), name=name, split=split)


@lru_cache(maxsize=8)
def _trace(name: str, path: str) -> Arrivals:
    return parse_arrivals(DataFolder(Path(path)).read(TRACES[name]), source=name)


def _process_of(whole: Arrivals, *, name: str, split: Split) -> ArrivalProcess:
    part = trace_part(whole, split)
    known = part if split == _TRAIN else trace_part(whole, _TRAIN)
    return ArrivalProcess(name, split, _sizes_of(part), trace=part, known_sizes=_sizes_of(known))


def _sizes_of(part: Arrivals) -> Sizes:
    return Sizes(part.input_tokens, part.output_tokens, part.source)


def trace_part(whole: Arrivals, split: Split) -> Arrivals:
    """The split's part of a trace, by time; see `PARTS` and `GAP_S`.

    The gap is shortened to a hundredth of a trace that lasts less than 100 gaps' time.
    """
    first = whole.seconds[0]
    duration = float(whole.seconds[-1] - first)
    begin, end = PARTS[split]
    gap = min(GAP_S, duration / 100.0)
    low = first + begin * duration + (gap if begin > 0 else 0.0)
    inside = (whole.seconds >= low) & (
        (whole.seconds < first + end * duration) if end < 1 else np.True_
    )
    if np.count_nonzero(inside) < 2:
        raise WorkloadError(
            f"has too few arrivals for a {split} part: {len(whole)} in all", source=whole.source
        )
    return Arrivals(
        seconds=whole.seconds[inside],
        input_tokens=np.maximum(whole.input_tokens[inside], 1),
        output_tokens=np.maximum(whole.output_tokens[inside], 1),
        source=f"{whole.source} ({split} part)",
    )


def user_arrivals(file: Path, split: Split | None = None) -> ArrivalProcess:
    """A user's own trace: CSV ``arrival_seconds,input_tokens,output_tokens``, or Azure's.

    Without ``split`` the whole trace is taken, and called test. Raises WorkloadError with
    file, row and column at the first bad cell.
    """
    whole = parse_arrivals(read_text(file), source=file.name)
    if split is not None:
        return _process_of(whole, name=file.name, split=check_split(split))
    if len(whole) < 2:
        raise WorkloadError("needs at least two arrivals", source=file.name)
    whole = replace(
        whole,
        input_tokens=np.maximum(whole.input_tokens, 1),
        output_tokens=np.maximum(whole.output_tokens, 1),
    )
    return ArrivalProcess(file.name, "test", _sizes_of(whole), trace=whole)


@lru_cache(maxsize=4)
def _synthetic_sizes(split: Split) -> Sizes:
    rng = np.random.default_rng([DRAWN_SIZES, len(split)])
    columns: Sequence[IntArray] = [
        np.clip(np.rint(rng.lognormal(math.log(median), spread, DRAWN_SIZES)), 1, 32_768).astype(
            np.int64
        )
        for median, spread in (INPUT_TOKENS, OUTPUT_TOKENS)
    ]
    return Sizes(columns[0], columns[1], "a synthetic generator")
