"""Scenarios: arrivals, prompts, lengths and limits joined into what a simulation is given.

No public data joins them, so a scenario takes each part from its own source and says so in
its description. Every part draws from a random stream of its own (`numpy.random.SeedSequence`),
so that runs of one seed differ in nothing but what was asked for: two loads get the same
prompts, two limits the same arrivals.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pointsman_common.data_folder import TEST_SCORES
from pointsman_core.prediction import DeclaredPriors
from pointsman_core.resources import Admission, Algorithm
from pointsman_core.snapshot import Snapshot
from pointsman_core.state import FloatArray, IntArray
from pointsman_core.workload import WorkloadError
from pointsman_learning.simulator.scenario import Availability, Change, Gauges, Scenario
from pointsman_learning.workloads.arrivals import (
    ArrivalProcess,
    Process,
    Sizes,
    Window,
    arrival_process,
)
from pointsman_learning.workloads.corpus import SPLITS, Corpus, Split, check_split, load_corpus
from pointsman_learning.workloads.folder import DataFolder
from pointsman_learning.workloads.pools import (
    Pool,
    capacity,
    columns_of,
    room_of,
    with_policy,
)
from pointsman_learning.workloads.synthetic import synthetic_corpus

LENGTH_ERROR = 0.5
"""Default error of predicted output lengths, see `predicted_lengths`. Ours."""
MIN_ANSWER_ROOM = 256
"""Tokens kept free for the answer when a prompt is longer than any endpoint's context."""


# --- Limits ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Limits:
    """Distribution of the requests' limits: a base, drawn evenly, times a factor. Ours."""

    name: str
    factor: tuple[float, float]
    """Least and greatest; each request's factor is drawn evenly on the logarithm between."""
    base_ms: tuple[float, ...] | None = None
    """Bases in ms per token; None: those of the arrival process."""

    def draw(
        self, rng: np.random.Generator, requests: int, base_ms: tuple[float, ...]
    ) -> FloatArray:
        """(N,) limits in seconds."""
        own = np.array(self.base_ms or base_ms)
        base = own[rng.integers(len(own), size=requests)]
        low, high = np.log(self.factor)
        limits: FloatArray = base * np.exp(low + (high - low) * rng.random(requests)) / 1e3
        return limits


LIMITS: dict[str, Limits] = {
    "x1": Limits("x1", (1.0, 1.0)),
    "x2.5": Limits("x2.5", (2.5, 2.5)),
    "x5": Limits("x5", (5.0, 5.0)),
    "mixed": Limits("mixed", (1.0, 5.0)),
}
"""Limits that have a name; ``mixed`` covers their whole range, for training."""

BASE_MS = (50.0, 70.0, 100.0)
"""Base limits in ms per token."""
CODE_BASE_MS = (70.0, 100.0, 200.0)
"""Those of the code trace, whose long prompts and short answers make tokens expensive."""


def limits_of(name: str | float | Limits) -> Limits:
    """Limits by name (`LIMITS`), by a factor such as ``x3`` or 3, or as they are.

    Raises WorkloadError for anything else.
    """
    if isinstance(name, Limits):
        return name
    if known := LIMITS.get(str(name)):
        return known
    try:
        factor = float(str(name).removeprefix("x"))
    except ValueError:
        factor = math.nan
    if not (math.isfinite(factor) and factor > 0):
        choices = ", ".join(LIMITS)
        raise WorkloadError(
            f"must be one of {choices}, or a factor like x3 (got {name!r})", source="limits"
        )
    return Limits(f"x{factor:g}", (factor, factor))


def base_limits_ms(process: str) -> tuple[float, ...]:
    """Base limits that go with an arrival process, in ms per token."""
    return CODE_BASE_MS if process == Process.AZURE_CODE else BASE_MS


# --- Mishaps ---------------------------------------------------------------------------

Mishaps = Callable[[np.random.Generator, int, float], tuple[Availability, ...]]
"""(random stream, endpoints, duration in seconds) -> changes of availability."""


def outages(
    rng: np.random.Generator, endpoints: int, duration_s: float
) -> tuple[Availability, ...]:
    """One endpoint fails within the middle third of a run, another joins there.

    The latter takes no requests before that. With a single endpoint it fails and comes back.
    """
    first, second = np.sort(rng.uniform(1 / 3, 2 / 3, size=2)) * duration_s
    if endpoints < 2:
        changes = [
            Availability(float(first), 0, Change.FAIL),
            Availability(float(second), 0, Change.JOIN),
        ]
        return tuple(changes)
    lost, joined = map(int, rng.permutation(endpoints)[:2])
    times = rng.permutation([first, second])
    changes = [
        Availability(0.0, joined, Change.LEAVE),
        Availability(float(times[0]), lost, Change.FAIL),
        Availability(float(times[1]), joined, Change.JOIN),
    ]
    return tuple(sorted(changes, key=lambda change: change.time_s))


# --- Lengths ---------------------------------------------------------------------------


def predicted_lengths(
    base: FloatArray, noise: FloatArray, *, sizes: Sizes, error: float
) -> FloatArray:
    """(N,) what a predictor of a stated error says of base output lengths. Ours.

    Such a predictor sees the logarithm of the true length plus normal noise of standard
    deviation ``error`` and answers with the expected length, as if lengths were lognormal; a
    factor makes it unbiased in the mean over the source. So 0 is the truth, about 0.5 a good
    predictor, infinity the mean length for everyone. ``noise`` is standard normal, (N,).
    """
    if error == 0:
        return base
    mean, factor = _calibration(sizes, error)
    spread = sizes.log_spread
    if math.isinf(error) or spread == 0:
        return np.full(len(base), mean)
    predicted = factor * _expected(np.log(base) + error * noise, sizes, error)
    return np.maximum(predicted, 1.0)


def _expected(signal: FloatArray, sizes: Sizes, error: float) -> FloatArray:
    centre = float(np.log(sizes.output_tokens).mean())
    weight = sizes.log_spread**2 / (sizes.log_spread**2 + error**2)
    left = weight * error**2
    expected: FloatArray = np.exp(centre + weight * (signal - centre) + left / 2.0)
    return expected


@lru_cache(maxsize=256)
def _calibration(sizes: Sizes, error: float) -> tuple[float, float]:
    """Mean length of a source, and the factor that makes predictions unbiased over it."""
    mean = float(sizes.output_tokens.mean())
    if math.isinf(error):
        return mean, 1.0
    rng = np.random.default_rng(0)
    length = np.log(np.resize(sizes.output_tokens, max(100_000, len(sizes.output_tokens))))
    expected = _expected(length + error * rng.standard_normal(len(length)), sizes, error)
    return mean, float(np.exp(length).mean() / expected.mean())


# --- The whole -------------------------------------------------------------------------


class _Streams(NamedTuple):
    """One random stream for each part; the order is fixed for good."""

    arrivals: np.random.Generator
    sizes: np.random.Generator
    prompts: np.random.Generator
    limits: np.random.Generator
    lengths: np.random.Generator
    mishaps: np.random.Generator


def _streams(seed: int, split: Split) -> _Streams:
    # The split takes part, so that no draw of a test run was seen in training.
    sequence = np.random.SeedSequence([seed, SPLITS.index(split)])
    return _Streams(*map(np.random.default_rng, sequence.spawn(len(_Streams._fields))))


def default_corpus(split: Split, pool: Pool | None = None) -> Corpus:
    """Return the public corpus where its files are, else a synthetic one for the pool."""
    folder = DataFolder.find()
    if folder is not None and folder.has(TEST_SCORES):
        return load_corpus(split, folder)
    if pool is None or pool.blends:
        return synthetic_corpus(split)
    return synthetic_corpus(split, pool.snapshot)


def make_scenario(
    *,
    pool_snapshot: Snapshot | Pool,
    process: str | ArrivalProcess,
    load: float | None,
    limits: str | float | Limits = "x1",
    split: Split,
    requests: int,
    seed: int,
    corpus: Corpus | None = None,
    predictor: FloatArray | None = None,
    predictor_name: str = "a model",
    predicted_tokens: FloatArray | None = None,
    length_error: float = LENGTH_ERROR,
    gauges: Gauges | None = None,
    mishaps: Mishaps | None = None,
    admission: Admission | None = None,
    algorithm: Algorithm | None = None,
) -> Scenario:
    """Compose one run; equal arguments give equal scenarios, to the last bit.

    Args:
        pool_snapshot: the endpoints; a `Pool` if it has experts that are blends.
        process: name of an arrival process, or one made for the same split.
        load: arrival rate as a share of the pool's `capacity` on the source's mean lengths;
            None: a trace's arrivals as they were recorded, whatever load that is.
        limits: see `limits_of`.
        split: which prompts, and which part of a trace.
        requests: N.
        seed: of all random streams; also chooses the window of a held-out trace.
        corpus: prompts and scores; by default `default_corpus`.
        predictor: (P, X) predicted quality for each of the corpus's prompts and experts; by
            default the pool's declared priors, the domain being told by keywords.
        predictor_name: what the description calls it.
        predicted_tokens: (P, X) learned lengths of answers, NaN where none was learned. They
            count where the corpus knows the answer's own length; else lengths come from the
            arrivals, and nothing learned from prompts could tell those.
        length_error: error of predicted output lengths, see `predicted_lengths`.
        gauges: staleness of the engines' metrics.
        mishaps: makes the changes of availability, for example `outages`.
        admission: instead of the snapshot's own.
        algorithm: instead of the snapshot's own.

    Raises:
        WorkloadError: something does not fit together; the message says what.

    """
    check_split(split)
    if load is not None and not (load > 0 and math.isfinite(load)):
        raise WorkloadError(f"must be above 0 (got {load})", source="load")
    if not length_error >= 0:
        raise WorkloadError(f"must be at least 0 (got {length_error})", source="length_error")
    pool = _as_pool(pool_snapshot)
    known = default_corpus(split, pool) if corpus is None else corpus
    if known.split != split:
        raise WorkloadError(
            f"is the {known.split} split, the scenario is of {split}", source=known.source
        )
    joined = _Joined.of(pool, known, admission=admission, algorithm=algorithm)
    arrivals = _process(process, split)
    streams = _streams(seed, split)
    whole = joined.capacity(arrivals.sizes)
    window = joined.fitted(
        arrivals.window(
            requests=requests,
            rate=None if load is None else load * whole,
            seed=seed,
            rng=streams.arrivals,
            sizes_rng=streams.sizes,
        )
    )
    as_recorded = load is None
    load = window.rate / whole if load is None else load
    rows = _shuffled(streams.prompts, joined.scored_prompts(), requests)
    columns = joined.columns(rows)
    # The same noise for every endpoint: what is hard to tell is how much the prompt asks for.
    lengths = joined.lengths(
        window,
        known.output_tokens[rows[:, None], columns],
        learned=joined.learned_lengths(predicted_tokens)[rows],
        sizes=arrivals.sizes if arrivals.known_sizes is None else arrivals.known_sizes,
        noise=streams.lengths.standard_normal(requests),
        error=length_error,
    )
    chosen = limits_of(limits)
    domains, domain_of_prompt = _numbered_domains(known)
    duration_s = float(window.seconds[-1])
    base_ms = chosen.base_ms or base_limits_ms(arrivals.name)
    quality_from = "declared priors" if predictor is None else predictor_name
    return Scenario(
        snapshot=joined.snapshot,
        arrival_s=window.seconds,
        prompt_tokens=window.input_tokens,
        limit_s=chosen.draw(streams.limits, requests, base_ms),
        score=known.scores[rows[:, None], columns],
        output_tokens=lengths.actual,
        predicted_quality=joined.quality(predictor)[rows],
        predicted_output_tokens=lengths.predicted,
        domain=domain_of_prompt[rows],
        domains=domains,
        prompt=rows,
        availability=mishaps(streams.mishaps, joined.endpoints, duration_s) if mishaps else (),
        gauges=gauges or Gauges(),
        seed=seed,
        load=load,
        description="composed: "
        + "; ".join(
            (
                f"{window.note}{' at' if as_recorded else ' to'} {window.rate:.3g} requests/s"
                f" (load {load:{'.3g' if as_recorded else 'g'}})",
                f"prompts and scores from {known.source}",
                _lengths_note(known, length_error, learned=predicted_tokens),
                f"quality predicted by {quality_from}",
                f"limits {chosen.name} of {', '.join(f'{base:g}' for base in base_ms)} ms/token",
            )
        ),
    )


def _as_pool(pool: Snapshot | Pool) -> Pool:
    return pool if isinstance(pool, Pool) else Pool(pool, {}, pool.full_name)


def _process(process: str | ArrivalProcess, split: Split) -> ArrivalProcess:
    if isinstance(process, str):
        return arrival_process(process, split=split)
    if process.split != split:
        raise WorkloadError(
            f"is of the {process.split} split, the scenario is of {split}", source=process.name
        )
    return process


def _shuffled(rng: np.random.Generator, rows: IntArray, wanted: int) -> IntArray:
    """Draw rows without repeats until all were drawn, then anew."""
    rounds = [rng.permutation(rows) for _ in range(-(-wanted // len(rows)))]
    return np.concatenate(rounds)[:wanted]


def _lengths_note(corpus: Corpus, error: float, *, learned: FloatArray | None) -> str:
    own = np.isfinite(corpus.output_tokens)
    origin = (
        "output lengths from the quality table"
        if own.all()
        else "output lengths are those of the arrivals times each expert's relative verbosity"
        + (", where the quality table has none" if own.any() else "")
    )
    by = f"synthetically with log error {error:g}"
    if learned is not None and (own & np.isfinite(learned)).any():
        by = f"by the model where the table has them and it learned them, else {by}"
    return f"{origin}, predicted {by}"


class _Lengths(NamedTuple):
    actual: IntArray
    """(N, E)"""
    predicted: FloatArray
    """(N, E)"""


@dataclass(frozen=True, slots=True, eq=False)
class _Joined:
    """A pool's E candidates and where a corpus knows them."""

    snapshot: Snapshot
    corpus: Corpus
    first: IntArray
    """(E,) column of the corpus."""
    second: IntArray
    """(E,) column that counts on a share of the prompts; that of ``first`` but for blends."""
    share: FloatArray
    verbosity: FloatArray
    """(E,) relative."""
    room: IntArray
    """(E,) tokens one request may have."""

    @classmethod
    def of(
        cls,
        pool: Pool,
        corpus: Corpus,
        *,
        admission: Admission | None,
        algorithm: Algorithm | None,
    ) -> "_Joined":
        first, second, share = columns_of(pool, corpus)
        verbosity = corpus.relative_verbosity
        return cls(
            snapshot=with_policy(pool.snapshot, admission=admission, algorithm=algorithm),
            corpus=corpus,
            first=first,
            second=second,
            share=share,
            verbosity=(1 - share) * verbosity[first] + share * verbosity[second],
            room=room_of(pool.snapshot),
        )

    @property
    def endpoints(self) -> int:
        return len(self.first)

    @property
    def most_input(self) -> int:
        """Tokens of the longest prompt that the roomiest endpoint takes with an answer."""
        widest = int(self.room.max())
        return max(widest - MIN_ANSWER_ROOM, (widest + 1) // 2)

    def capacity(self, sizes: Sizes) -> float:
        """Requests per second, see `pools.capacity`."""
        inputs, outputs = _mean_sizes(sizes, self.most_input)
        own = _mean_own_lengths(self.corpus)[self.first]
        lengths = np.where(np.isfinite(own), own, outputs * self.verbosity)
        return capacity(
            self.snapshot,
            input_tokens=inputs,
            output_tokens=np.minimum(lengths, np.maximum(self.room - inputs, 1.0)),
        )

    def fitted(self, window: Window) -> Window:
        """Cut prompts that no endpoint could take, as a client would have to."""
        inputs = np.clip(window.input_tokens, 1, self.most_input)
        return replace(window, input_tokens=inputs)

    def scored_prompts(self) -> IntArray:
        """Rows of the prompts that have a score of every expert here."""
        used = np.unique(np.concatenate((self.first, self.second)))
        rows = np.flatnonzero(np.isfinite(self.corpus.scores[:, used]).all(axis=1))
        if not len(rows):
            raise WorkloadError(
                "has no prompt with a score of every expert of the pool", source=self.corpus.source
            )
        return rows

    def columns(self, rows: IntArray) -> IntArray:
        """(N, E) column of the corpus that holds each answer's score."""
        draws = _draw_of_prompt(self.corpus)[rows]
        second = draws[:, None] < self.share
        return np.where(second, self.second, self.first)

    def lengths(
        self,
        window: Window,
        own: FloatArray,
        *,
        learned: FloatArray,
        sizes: Sizes,
        noise: FloatArray,
        error: float,
    ) -> _Lengths:
        """Lengths by endpoint: the answer's own where known, else base times verbosity.

        An engine stops when the context is full, so they are cut there; ``own`` and
        ``learned`` are (N, E), NaN where unknown.
        """
        base = window.output_tokens.astype(np.float64)
        guess = predicted_lengths(base, noise, sizes=sizes, error=error)
        actual = base[:, None] * self.verbosity
        predicted = guess[:, None] * self.verbosity
        for endpoint in np.flatnonzero(np.isfinite(own).any(axis=0)):
            known = np.isfinite(own[:, endpoint])
            lengths = own[known, endpoint]
            like = _own_sizes(self.corpus, int(self.first[endpoint]))
            actual[known, endpoint] = lengths
            predicted[known, endpoint] = predicted_lengths(
                lengths, noise[known], sizes=like, error=error
            )
        told = np.isfinite(own) & np.isfinite(learned)
        predicted[told] = learned[told]
        left = np.maximum(self.room[None, :] - window.input_tokens[:, None], 1)
        return _Lengths(
            np.clip(np.rint(actual), 1, left).astype(np.int64), np.clip(predicted, 1.0, left)
        )

    def learned_lengths(self, predicted: FloatArray | None) -> FloatArray:
        """(P, E) learned length of each prompt's answers, NaN where none was learned."""
        if predicted is None:
            return np.full((len(self.corpus), self.endpoints), math.nan)
        return self._by_endpoint(predicted, source="predicted_tokens")

    def _by_endpoint(self, values: FloatArray, *, source: str) -> FloatArray:
        """(P, E) of what is told for each of the corpus's prompts and experts, (P, X)."""
        shape = (len(self.corpus), len(self.corpus.experts))
        if values.shape != shape:
            raise WorkloadError(
                f"must be of shape {shape}, prompts by experts of {self.corpus.source}"
                f" (got {values.shape})",
                source=source,
            )
        # Not by weight alone: an unknown second expert must not spoil what has none (0 x NaN).
        first, second = values[:, self.first], values[:, self.second]
        mixed: FloatArray = np.where(
            self.share > 0, (1 - self.share) * first + self.share * second, first
        )
        return mixed

    def quality(self, predictor: FloatArray | None) -> FloatArray:
        """(P, E) predicted quality of each prompt's answers."""
        if predictor is None:
            return self._declared()
        used = self._by_endpoint(predictor, source="predictor")
        if not (np.isfinite(used).all() and used.min() >= 0 and used.max() <= 1):
            raise WorkloadError("must hold numbers from 0 to 1", source="predictor")
        return used

    def _declared(self) -> FloatArray:
        """(P, E) what core's `DeclaredPriors` says, asked once per domain."""
        told = self.corpus.told_domains(self.snapshot.domains)
        priors = DeclaredPriors(self.snapshot)
        _, example, number = np.unique(told, return_index=True, return_inverse=True)
        by_domain = np.stack([priors.predict(self.corpus.prompts[i]).quality for i in example])
        quality: FloatArray = by_domain[number]
        return quality


@lru_cache(maxsize=256)
def _mean_sizes(sizes: Sizes, most_input: int) -> tuple[float, float]:
    inputs = np.clip(sizes.input_tokens, 1, most_input)
    return float(inputs.mean()), float(sizes.output_tokens.mean())


@lru_cache(maxsize=64)
def _mean_own_lengths(corpus: Corpus) -> FloatArray:
    """(X,) mean of the known lengths of an expert's answers, NaN where none is known."""
    known = np.isfinite(corpus.output_tokens)
    counts = known.sum(axis=0)
    sums = np.where(known, corpus.output_tokens, 0.0).sum(axis=0)
    return np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)


@lru_cache(maxsize=256)
def _own_sizes(corpus: Corpus, column: int) -> Sizes:
    lengths = corpus.output_tokens[:, column]
    known = np.rint(lengths[np.isfinite(lengths)]).astype(np.int64)
    return Sizes(np.ones_like(known), known, corpus.source)


@lru_cache(maxsize=64)
def _draw_of_prompt(corpus: Corpus) -> FloatArray:
    """(P,) a number from 0 to 1 that depends on the prompt only."""
    digests = (hashlib.sha256(prompt.encode()).digest() for prompt in corpus.prompts)
    return np.array([int.from_bytes(digest[8:16]) / 2**64 for digest in digests])


@lru_cache(maxsize=64)
def _numbered_domains(corpus: Corpus) -> tuple[tuple[str, ...], IntArray]:
    names, numbers = np.unique(np.array(corpus.domains, dtype=object), return_inverse=True)
    return tuple(map(str, names)), numbers.astype(np.int64)
