"""Measured engine iterations: rows of the calibration, and their CSV format (ours).

A row is the mean of some like iterations of one engine:

======================  =============================================================
``batch``               sequences that decoded one token each
``context_tokens``      tokens in the KV cache of all sequences of the batch
``prefill_tokens``      tokens of prompts computed
``iteration_seconds``   time of one iteration
``iterations``          how many were averaged (optional, 1)
======================  =============================================================
"""

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

COLUMNS = ("batch", "context_tokens", "prefill_tokens", "iteration_seconds")
OPTIONAL = "iterations"

MIN_ROWS = 6
"""Fewer rows than this say nothing about how well four times were fitted."""


class CalibrationError(ValueError):
    """Measurements, an engine or a history from which no cost model can be had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Means over some like iterations."""

    batch: float
    context_tokens: float
    prefill_tokens: float
    iteration_seconds: float
    iterations: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Measurements:
    """Rows as columns, each of shape (rows,)."""

    batch: FloatArray
    context_tokens: FloatArray
    prefill_tokens: FloatArray
    iteration_seconds: FloatArray
    iterations: FloatArray

    @classmethod
    def of(cls, rows: Iterable[Measurement]) -> "Measurements":
        """Turn rows into columns."""
        table = list(rows)
        names = (*COLUMNS, OPTIONAL)
        return cls(*(np.array([getattr(row, name) for row in table], float) for name in names))

    def __len__(self) -> int:
        return len(self.batch)

    def __getitem__(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> "Measurements":
        names = (*COLUMNS, OPTIONAL)
        return Measurements(*(getattr(self, name)[chosen] for name in names))

    @property
    def tokens(self) -> FloatArray:
        """(rows,) tokens computed by an iteration: prompts' and decoded ones."""
        return self.batch + self.prefill_tokens


def write_csv(measurements: Measurements) -> str:
    """Render the rows in the CSV format."""
    columns = (*COLUMNS, OPTIONAL)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*(getattr(measurements, name) for name in columns), strict=True):
        writer.writerow(f"{value:.7g}" for value in row)
    return out.getvalue()


def read_csv(text: str, *, source: str) -> Measurements:
    """Read the CSV format; further columns are ignored.

    Raises `CalibrationError` naming row and column of the first wrong cell.
    """
    reader = csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True)
    header = [name.strip() for name in reader.fieldnames or ()]
    reader.fieldnames = header
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        found = ",".join(header)[:200] or "nothing"
        raise CalibrationError(
            f"{source}, row 1: the header lacks {', '.join(missing)} (got {found})"
        )
    try:
        rows = list(_rows(reader, source))
    except csv.Error as error:
        raise CalibrationError(f"{source}, row {reader.line_num}: is not CSV: {error}") from error
    if len(rows) < MIN_ROWS:
        raise CalibrationError(
            f"{source}: needs at least {MIN_ROWS} rows of measurements (got {len(rows)})"
        )
    return Measurements.of(rows)


def _rows(reader: "csv.DictReader[str]", source: str) -> Iterator[Measurement]:
    for cells in reader:
        place = f"{source}, row {reader.line_num}"
        values = {name: _number(cells.get(name), f"{place}, column {name}") for name in COLUMNS}
        if cells.get(OPTIONAL):
            values[OPTIONAL] = _number(cells[OPTIONAL], f"{place}, column {OPTIONAL}")
        row = Measurement(**values)
        if row.iteration_seconds <= 0 or row.iterations <= 0:
            raise CalibrationError(f"{place}: iteration_seconds and iterations must be above 0")
        if row.batch + row.prefill_tokens <= 0:
            raise CalibrationError(f"{place}: an iteration computes at least one token")
        yield row


def _number(cell: str | Sequence[str] | None, place: str) -> float:
    if cell is None:
        raise CalibrationError(f"{place}: the cell is missing")
    try:
        value = float(cell)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise CalibrationError(f"{place}: must be a number of at least 0 (got {str(cell)[:40]!r})")
    return value
