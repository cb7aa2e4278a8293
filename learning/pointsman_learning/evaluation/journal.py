"""Finished runs of an evaluation on disk, so that one that was killed can go on.

One line of JSON says what the evaluation is, then there is one for each finished run; what was
not written to the end of its line does not count.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, BinaryIO, Final, Self

import numpy as np
import orjson

from pointsman_core.resources import Admission
from pointsman_learning.evaluation.metrics import Metrics, Prompts, Routing, Timeline
from pointsman_learning.evaluation.plan import Task, Window
from pointsman_learning.evaluation.runner import Run
from pointsman_learning.resumed import differences

FILE: Final = "unfinished-runs.jsonl"
"""In the output folder, until the evaluation is complete."""


class JournalError(ValueError):
    """An evaluation cannot be gone on with; the message says why."""


class Journal:
    """The finished runs of one evaluation; a context manager, which closes the file."""

    def __init__(self, file: Path, stream: BinaryIO, runs: list[Run]) -> None:
        self._file, self._stream = file, stream
        self.runs = runs
        """All that are finished, those of earlier processes first."""

    @classmethod
    def begin(cls, folder: Path, settings: Mapping[str, Any]) -> Self:
        """Begin anew, whatever was there. Raises OSError."""
        file = folder / FILE
        stream = file.open("wb")
        stream.write(_line(settings))
        stream.flush()
        return cls(file, stream, [])

    @classmethod
    def resume(cls, folder: Path, settings: Mapping[str, Any]) -> Self:
        """Go on with what is there.

        Raises:
            JournalError: there is nothing to go on with, or it has other settings.
            OSError: the file cannot be used.

        """
        file = folder / FILE
        if not file.exists():
            raise JournalError(f"{folder} holds no evaluation that was broken off")
        whole, newline, _ = file.read_bytes().rpartition(b"\n")
        first, *rest = whole.split(b"\n")
        try:
            was = orjson.loads(first)
            runs = [_run(orjson.loads(line)) for line in rest]
        except (ValueError, KeyError, TypeError) as error:
            raise JournalError(f"{file} is damaged, or of another release: {error}") from error
        changed = differences(was, orjson.loads(_line(settings)))
        if changed:
            raise JournalError(
                f"the evaluation in {folder} had other settings: {'; '.join(changed)}"
            )
        stream = file.open("r+b")
        stream.seek(len(whole) + len(newline))
        stream.truncate()
        return cls(file, stream, runs)

    def add(self, run: Run) -> None:
        """Keep a finished run."""
        self._stream.write(_line(asdict(run)))
        self._stream.flush()
        self.runs.append(run)

    def complete(self) -> None:
        """Nothing is left to be gone on with."""
        self._stream.close()
        self._file.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def _line(content: Mapping[str, Any]) -> bytes:
    options = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
    return orjson.dumps(content, option=options)


def _run(told: dict[str, Any]) -> Run:
    """What `Journal.add` wrote; numbers are the same to the last bit."""
    task, line, way, asked = (told.pop(n) for n in ("task", "timeline", "routing", "prompts"))
    metrics: dict[str, Any] = {}
    metrics |= {name: math.nan if v is None else v for name, v in told.pop("metrics").items()}
    if metrics.keys() != {field.name for field in fields(Metrics)}:
        raise ValueError("its runs have other metrics")
    return Run(
        task=Task(
            window=Window(**task["window"]),
            admission=Admission(task["admission"]),
            decider=task["decider"],
        ),
        metrics=Metrics(**metrics),
        routing=Routing(
            domains=tuple(way["domains"]),
            experts=tuple(way["experts"]),
            requests=np.array(way["requests"], np.int64),
            qos=np.array(way["qos"], np.float64),
        ),
        timeline=Timeline(
            bin_s=line["bin_s"],
            requests=np.array(line["requests"], np.int64),
            qos=np.array(line["qos"], np.float64),
        ),
        prompts=None
        if asked is None
        else Prompts(
            rows=np.array(asked["rows"], np.int64),
            requests=np.array(asked["requests"], np.int64),
            qos=np.array(asked["qos"], np.float64),
        ),
        **told,
    )
