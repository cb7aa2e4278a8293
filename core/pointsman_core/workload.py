"""Workloads: when requests arrive, what they ask, and how well each expert answers them.

No public data set joins arrivals, prompts, quality by expert and answer lengths, so a
workload takes the arrivals from one source and the scored prompts from another, and says
so in its description. Two file formats are general: arrivals
``arrival_seconds,input_tokens,output_tokens`` and quality
``prompt,expert,score,output_tokens`` (both CSV with a header); the Azure LLM inference
trace and the score files of LLMRouter are read as they are published.
"""

import csv
import io
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import NormalDist

import numpy as np
import orjson
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

ARRIVAL_COLUMNS = ("arrival_seconds", "input_tokens", "output_tokens")
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
QUALITY_COLUMNS = ("prompt", "expert", "score", "output_tokens")

MAX_TOKENS = 10_000_000
"""Largest believable token count; anything above is an error in the file."""


class WorkloadError(ValueError):
    """A file or an argument from which no workload can be made."""

    def __init__(
        self, message: str, *, source: str, row: int | None = None, column: str | None = None
    ) -> None:
        self.source = source
        self.row = row
        """Line of the file (a CSV's header is 1) or position in a JSON list, from 1."""
        self.column = column
        self.message = message
        place = source
        if row is not None:
            place += f", row {row}"
        if column is not None:
            place += f", column {column}"
        super().__init__(f"{place}: {message}")


@dataclass(frozen=True, slots=True, eq=False)
class Arrivals:
    """When requests arrive and how long they are; the three arrays have equal length."""

    seconds: FloatArray
    """Arrival times in seconds, ascending; shape (requests,)."""
    input_tokens: IntArray
    """Prompt lengths; shape (requests,)."""
    output_tokens: IntArray
    """Answer lengths as the trace recorded them; shape (requests,)."""
    source: str
    """Where they come from, for reports."""

    def __len__(self) -> int:
        return len(self.seconds)

    @property
    def gaps(self) -> FloatArray:
        """Seconds from each arrival to the next; after the last one the mean gap."""
        gaps = np.diff(self.seconds)
        mean = float(gaps.mean()) if len(gaps) else 0.0
        return np.append(gaps, mean)

    @property
    def rate(self) -> float:
        """Mean arrivals per second."""
        total = float(self.gaps.sum())
        return len(self) / total if total > 0 else math.inf

    def window(self, *, start: int, requests: int, rate: float | None) -> "Arrivals":
        """Cut ``requests`` consecutive arrivals and stretch their times to a mean rate.

        The first one arrives at second 0 and all gaps are scaled alike, so bursts keep
        their shape; without a rate they are as recorded. A trace that is too short starts
        again from its beginning.
        """
        if requests < 1 or not (rate is None or rate > 0):
            raise WorkloadError(
                f"needs at least 1 request at a rate above 0 (got {requests} at {rate}/s)",
                source=self.source,
            )
        index = (start + np.arange(requests)) % len(self)
        gaps = self.gaps[index]
        total = float(gaps.sum())
        if total <= 0:
            raise WorkloadError(
                f"{requests} arrivals from number {start + 1} on fall into one moment",
                source=self.source,
            )
        scale = 1.0 if rate is None else requests / rate / total
        times = np.concatenate(([0.0], np.cumsum(gaps[:-1]))) * scale
        return Arrivals(times, self.input_tokens[index], self.output_tokens[index], self.source)


@dataclass(frozen=True, slots=True, eq=False)
class QualityTable:
    """How well each expert answers each prompt."""

    prompts: tuple[str, ...]
    experts: tuple[str, ...]
    scores: FloatArray
    """Score from 0 to 1, NaN where unknown; shape (prompts, experts)."""
    output_tokens: FloatArray
    """Length of each expert's answer in tokens, NaN where unknown; same shape."""
    source: str
    domains: tuple[str, ...] | None = None
    """Domain of each prompt, where the source tells it."""

    def __len__(self) -> int:
        return len(self.prompts)

    def without(self, prompts: Collection[str]) -> "QualityTable":
        """Leave out the given prompts, for example those a model was trained on."""
        left_out = frozenset(prompts)
        keep = [index for index, prompt in enumerate(self.prompts) if prompt not in left_out]
        return QualityTable(
            prompts=tuple(self.prompts[index] for index in keep),
            experts=self.experts,
            scores=self.scores[keep],
            output_tokens=self.output_tokens[keep],
            source=self.source,
            domains=None if self.domains is None else tuple(self.domains[i] for i in keep),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """Requests in order of arrival, each with a prompt that has known scores."""

    arrivals: Arrivals
    table: QualityTable
    prompt_index: IntArray
    """Row of ``table`` that each request asks; shape (requests,)."""
    seed: int
    description: str
    """One sentence on where the parts come from, shown beside every result."""

    def __len__(self) -> int:
        return len(self.arrivals)

    @property
    def prompts(self) -> tuple[str, ...]:
        """Prompt of each request."""
        return tuple(self.table.prompts[index] for index in self.prompt_index)

    @property
    def scores(self) -> FloatArray:
        """Score of each expert's answer to each request; shape (requests, experts)."""
        return self.table.scores[self.prompt_index]

    @property
    def output_tokens(self) -> FloatArray:
        """Answer length of each expert, NaN where unknown; shape (requests, experts)."""
        return self.table.output_tokens[self.prompt_index]


def compose(
    arrivals: Arrivals, table: QualityTable, *, requests: int, rate: float, seed: int
) -> Workload:
    """Join arrivals with scored prompts that were never asked together.

    A window of the trace starts at a place drawn by ``seed`` and is stretched to ``rate``
    requests per second; the prompts are a seeded shuffle of the table, without repeats
    until all were used.
    """
    _require_rows(arrivals, arrivals.source)
    _require_rows(table, table.source)
    generator = np.random.default_rng(seed)
    start = int(generator.integers(max(1, len(arrivals) - requests + 1)))
    return Workload(
        arrivals=arrivals.window(start=start, requests=requests, rate=rate),
        table=table,
        prompt_index=_shuffled(generator, len(table), requests),
        seed=seed,
        description=(
            f"composed: arrivals and input sizes from {arrivals.source} (time-scaled to"
            f" {rate:.3g} requests/s), prompts and scores from {table.source}"
        ),
    )


def _require_rows(part: Arrivals | QualityTable, source: str) -> None:
    if len(part) == 0:
        raise WorkloadError("has no rows", source=source)


def _shuffled(generator: np.random.Generator, size: int, wanted: int) -> IntArray:
    rounds = [generator.permutation(size) for _ in range(-(-wanted // size))]
    return np.concatenate(rounds)[:wanted].astype(np.int64)


def column_of(names: Iterable[str], columns: Sequence[str]) -> int | None:
    """Column of a score table that belongs to an expert of these names; None: it has none.

    Case and what stands before the last ``/`` are ignored, since served names often carry
    their publisher: google/gemma-2-9b-it.
    """
    wanted = [name.rpartition("/")[2].casefold() for name in names]
    known = {name.rpartition("/")[2].casefold(): index for index, name in enumerate(columns)}
    return next((known[name] for name in wanted if name in known), None)


# --- Arrivals --------------------------------------------------------------------------


def parse_arrivals(text: str, *, source: str) -> Arrivals:
    """Read an arrivals file, told by its header: the general format or the Azure trace.

    Raises WorkloadError with file, row and column at the first bad cell. Rows may come in
    any order; Azure's time stamps become seconds since the first of them.
    """
    rows = _CsvRows(text, source=source)
    if rows.has(ARRIVAL_COLUMNS):
        time_column, input_column, output_column = ARRIVAL_COLUMNS
        cells = [
            (row.number(time_column), row.tokens(input_column), row.tokens(output_column))
            for row in rows
        ]
    elif rows.has(AZURE_COLUMNS):
        time_column, input_column, output_column = AZURE_COLUMNS
        cells = [
            (row.timestamp(time_column), row.tokens(input_column), row.tokens(output_column))
            for row in rows
        ]
        first = min((seconds for seconds, _, _ in cells), default=0.0)
        cells = [(seconds - first, inputs, outputs) for seconds, inputs, outputs in cells]
    else:
        raise rows.missing_columns(ARRIVAL_COLUMNS, AZURE_COLUMNS)
    return _arrivals(cells, source=source)


def _arrivals(cells: Sequence[tuple[float, int, int]], *, source: str) -> Arrivals:
    if not cells:
        raise WorkloadError("has no rows", source=source)
    times, inputs, outputs = zip(*cells, strict=True)
    seconds = np.array(times, dtype=np.float64)
    order = np.argsort(seconds, kind="stable")
    return Arrivals(
        seconds=seconds[order],
        input_tokens=np.array(inputs, dtype=np.int64)[order],
        output_tokens=np.array(outputs, dtype=np.int64)[order],
        source=source,
    )


# --- Quality ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Answer:
    prompt: str
    expert: str
    score: float
    output_tokens: float


def parse_quality(text: str, *, source: str) -> QualityTable:
    """Read scores by prompt and expert: the general CSV, or LLMRouter's JSON.

    Raises WorkloadError with file, row and column at the first bad cell.
    """
    is_json = text.lstrip()[:1] in ("[", "{")
    answers = _json_answers(text, source) if is_json else _csv_answers(text, source)
    return _table(answers, source=source)


def _csv_answers(text: str, source: str) -> Iterator[_Answer]:
    rows = _CsvRows(text, source=source)
    if not rows.has(QUALITY_COLUMNS):
        raise rows.missing_columns(QUALITY_COLUMNS)
    seen: set[tuple[str, str]] = set()
    for row in rows:
        answer = _Answer(
            prompt=row.text("prompt"),
            expert=row.text("expert"),
            score=row.score("score"),
            output_tokens=row.tokens("output_tokens") if row.filled("output_tokens") else math.nan,
        )
        if (answer.prompt, answer.expert) in seen:
            raise row.error("expert", f"{answer.expert} was already scored on this prompt")
        seen.add((answer.prompt, answer.expert))
        yield answer


def _json_answers(text: str, source: str) -> Iterator[_Answer]:
    try:
        entries = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise WorkloadError(
            f"is not JSON: {error.msg}", source=source, row=error.lineno, column=str(error.colno)
        ) from error
    if not isinstance(entries, list):
        raise WorkloadError("must be a list of questions with scores", source=source)
    seen: set[str] = set()
    for row, entry in enumerate(entries, start=1):
        prompt, scores = _json_entry(entry, source=source, row=row)
        # LLMRouter repeats no question within a file; should one be repeated, the first counts.
        if prompt not in seen:
            seen.add(prompt)
            for expert, score in scores.items():
                yield _Answer(prompt, expert, _json_score(score, source, row, expert), math.nan)


def _json_entry(entry: object, *, source: str, row: int) -> tuple[str, dict[str, object]]:
    if not isinstance(entry, dict):
        raise WorkloadError("must be an object", source=source, row=row)
    prompt, scores = entry.get("question"), entry.get("scores")
    if not isinstance(prompt, str) or not prompt:
        raise WorkloadError("must be a text", source=source, row=row, column="question")
    if not isinstance(scores, dict) or not scores:
        raise WorkloadError(
            "must be an object of scores by expert", source=source, row=row, column="scores"
        )
    return prompt, scores


def _json_score(score: object, source: str, row: int, expert: str) -> float:
    if isinstance(score, int | float) and not isinstance(score, bool) and 0 <= score <= 1:
        return float(score)
    raise WorkloadError(
        f"must be a number from 0 to 1 (got {score!r})",
        source=source,
        row=row,
        column=f"scores.{expert}",
    )


def _table(answers: Iterable[_Answer], *, source: str) -> QualityTable:
    collected = list(answers)
    if not collected:
        raise WorkloadError("has no rows", source=source)
    prompts = {answer.prompt: 0 for answer in collected}
    experts = {answer.expert: 0 for answer in collected}
    for numbering in (prompts, experts):
        for index, name in enumerate(numbering):
            numbering[name] = index
    scores = np.full((len(prompts), len(experts)), np.nan)
    lengths = scores.copy()
    for answer in collected:
        cell = prompts[answer.prompt], experts[answer.expert]
        scores[cell] = answer.score
        lengths[cell] = answer.output_tokens
    return QualityTable(tuple(prompts), tuple(experts), scores, lengths, source)


# --- CSV -------------------------------------------------------------------------------


class _CsvRows:
    """Rows of a CSV text with a header; iterates once, skips empty lines."""

    def __init__(self, text: str, *, source: str) -> None:
        self.source = source
        self._reader = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True)
        self.header = [name.strip() for name in next(self._lines(), [])]

    def has(self, columns: Sequence[str]) -> bool:
        return set(columns) <= set(self.header)

    def missing_columns(self, *choices: Sequence[str]) -> WorkloadError:
        wanted = " or ".join(",".join(columns) for columns in choices)
        found = ",".join(self.header) or "nothing"
        return WorkloadError(
            f"the header must be {wanted} (got {found[:200]})", source=self.source, row=1
        )

    def __iter__(self) -> Iterator["_CsvRow"]:
        for cells in self._lines():
            line = self._reader.line_num
            if len(cells) != len(self.header):
                raise WorkloadError(
                    f"has {len(cells)} cells, the header has {len(self.header)}",
                    source=self.source,
                    row=line,
                )
            row = dict(zip(self.header, cells, strict=True))
            yield _CsvRow(row, source=self.source, line=line)

    def _lines(self) -> Iterator[list[str]]:
        try:
            yield from (cells for cells in self._reader if cells)
        except csv.Error as error:
            raise WorkloadError(
                f"is not CSV: {error}", source=self.source, row=self._reader.line_num
            ) from error


class _CsvRow:
    """One row; each reader raises a WorkloadError that names the cell."""

    def __init__(self, cells: dict[str, str], *, source: str, line: int) -> None:
        self._cells = cells
        self._source = source
        self._line = line

    def error(self, column: str, message: str) -> WorkloadError:
        return WorkloadError(message, source=self._source, row=self._line, column=column)

    def filled(self, column: str) -> bool:
        return bool(self._cells[column].strip())

    def text(self, column: str) -> str:
        if not self.filled(column):
            raise self.error(column, "is empty")
        return self._cells[column]

    def number(self, column: str, *, maximum: float = math.inf) -> float:
        cell = self._cells[column]
        try:
            value = float(cell)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and 0 <= value <= maximum):
            limits = "of at least 0" if math.isinf(maximum) else f"from 0 to {maximum:g}"
            raise self.error(column, f"must be a number {limits} (got {cell[:40]!r})")
        return value

    def score(self, column: str) -> float:
        return self.number(column, maximum=1.0)

    def tokens(self, column: str) -> int:
        value = self.number(column, maximum=MAX_TOKENS)
        if value != int(value):
            cell = self._cells[column]
            raise self.error(column, f"must be a whole number of tokens (got {cell[:40]!r})")
        return int(value)

    def timestamp(self, column: str) -> float:
        cell = self._cells[column]
        try:
            moment = datetime.fromisoformat(cell.strip())
        except ValueError as error:
            message = f"must be a time like 2023-11-16 18:15:46.68 (got {cell[:40]!r})"
            raise self.error(column, message) from error
        # The trace names no zone; only differences matter.
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


# --- Synthetic -------------------------------------------------------------------------

DOMAINS = ("code", "math", "science", "commonsense", "knowledge")

PROMPT_CORRELATION = 0.3
"""How alike experts fare on one prompt: hard questions are hard for all. Ours."""
INPUT_TOKENS = (400.0, 0.9)
"""Median and log-spread of synthetic prompt lengths, near the Azure chat trace. Ours."""
OUTPUT_TOKENS = (130.0, 0.7)
"""Median and log-spread of synthetic answer lengths, near the Azure chat trace. Ours."""

_NAMES = ("Ada", "Ben", "Carla", "Deniz", "Elif", "Farid", "Greta", "Hiro")
_TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "code": (
        "Write a Python function task_{n} that returns the {k} largest elements of a list.",
        "Write a function to count how many strings in a list are longer than {n} characters.",
        "def step_{n}(numbers: list[int]) -> int:\n"
        '    """Return the sum of every {k}th element of the list."""\n',
    ),
    "math": (
        "{name} buys {n} pens at ${k} each and sells half of them for twice the price."
        " How many dollars of profit does {name} make?",
        "Solve the equation {k}x + {n} = 0 for x.",
        "A train travels {n} miles in {k} hours. How far does it go in one day at that speed?",
    ),
    "science": (
        "Which of the following gases makes up most of the atmosphere of a planet with an"
        " orbit of {n} days? A. nitrogen B. oxygen C. argon D. water vapour",
        "A sample of {n} grams of a metal is heated by {k} degrees."
        " Which property of the atom decides how much energy it takes up?",
        "Which organism is most likely to survive {n} weeks without light? A. a fern B. a fungus",
    ),
    "commonsense": (
        "{name} needed a new hose for machine {n}, where would {name} most likely go?",
        "What would people usually do after waiting {n} minutes for a late bus?",
        "{name} put {k} plates on the table. What is {name} likely to do next, number {n}?",
    ),
    "knowledge": (
        "who won the world championship number {n} and when did it take place",
        "Who was the mayor of the town that was founded in the year {n}?",
        "when was the book with {n} chapters first published and in what country",
    ),
}


def synthetic(
    *, requests: int, rate: float, seed: int, means: Mapping[str, Mapping[str, float]]
) -> Workload:
    """Make a workload without any data; equal arguments give equal workloads.

    Arrivals are a Poisson process of ``rate`` requests per second, prompts come from
    templates of five domains, and a score is 1 or 0 with the expert's mean in that domain.

    ``means`` maps each expert to its mean score by domain (all of ``DOMAINS``).
    """
    if requests < 1 or not rate > 0 or not means:
        raise WorkloadError(
            "needs at least one request, one expert and a rate above 0", source="synthetic"
        )
    generator = np.random.default_rng(seed)
    gaps = generator.exponential(1.0 / rate, size=requests)
    source = "a synthetic generator (Poisson arrivals)"
    arrivals = Arrivals(
        seconds=np.cumsum(gaps) - gaps[0],
        input_tokens=_lengths(generator, INPUT_TOKENS, requests),
        output_tokens=_lengths(generator, OUTPUT_TOKENS, requests),
        source=source,
    )
    domains = tuple(DOMAINS[index] for index in generator.integers(len(DOMAINS), size=requests))
    experts = tuple(means)
    table = QualityTable(
        prompts=tuple(_prompt(generator, domain) for domain in domains),
        experts=experts,
        scores=draw_scores(generator, np.array([[means[e][d] for e in experts] for d in domains])),
        output_tokens=np.full((requests, len(experts)), np.nan),
        source="a synthetic generator (templates, drawn scores)",
        domains=domains,
    )
    return Workload(
        arrivals=arrivals,
        table=table,
        prompt_index=np.arange(requests),
        seed=seed,
        description=(
            f"synthetic: Poisson arrivals of {rate:.3g} requests/s, prompts from templates,"
            " scores drawn from the experts' declared means"
        ),
    )


def _lengths(
    generator: np.random.Generator, median_and_spread: tuple[float, float], requests: int
) -> IntArray:
    median, spread = median_and_spread
    drawn = generator.lognormal(math.log(median), spread, size=requests)
    return np.clip(np.rint(drawn), 1, 32_768).astype(np.int64)


def _prompt(generator: np.random.Generator, domain: str) -> str:
    templates = _TEMPLATES[domain]
    return templates[generator.integers(len(templates))].format(
        n=generator.integers(10, 100_000),
        k=generator.integers(2, 10),
        name=_NAMES[generator.integers(len(_NAMES))],
    )


def draw_scores(generator: np.random.Generator, means: FloatArray) -> FloatArray:
    """Draw 0 or 1 with the given means (prompts, experts), correlated within a prompt."""
    shared = generator.standard_normal((means.shape[0], 1))
    own = generator.standard_normal(means.shape)
    drawn = math.sqrt(PROMPT_CORRELATION) * shared + math.sqrt(1 - PROMPT_CORRELATION) * own
    thresholds = np.vectorize(NormalDist().inv_cdf, otypes=[np.float64])(
        np.clip(means, 1e-9, 1 - 1e-9)
    )
    scores: FloatArray = (drawn < thresholds).astype(np.float64)
    return scores
