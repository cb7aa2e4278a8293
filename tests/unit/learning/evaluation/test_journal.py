"""Finished runs on disk: equal to the last bit, or refused."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from pointsman_learning.evaluation import Plan, Run
from pointsman_learning.evaluation.journal import FILE, Journal, JournalError

Fake = Callable[[Plan], list[Run]]
SETTINGS = {"requests": 100, "base_limits_ms": (50.0, 70.0), "deciders": ["Random"]}


def test_runs_come_back_as_they_were(plan: Plan, fakes: Fake, tmp_path: Path) -> None:
    first, second, third, *_ = fakes(plan)
    second = replace(second, prompts=None, load=1 / 3)
    with Journal.begin(tmp_path, SETTINGS) as journal:
        for run in (first, second):
            journal.add(run)
    with Journal.resume(tmp_path, SETTINGS) as journal:
        assert [run.task for run in journal.runs] == [first.task, second.task]
        for was, now in zip((first, second), journal.runs, strict=True):
            np.testing.assert_equal(asdict(now), asdict(was))
            assert now.routing.qos.dtype == was.routing.qos.dtype
            assert now.routing.requests.dtype == was.routing.requests.dtype
        journal.add(third)
    with Journal.resume(tmp_path, SETTINGS) as journal:
        assert len(journal.runs) == 3
        journal.complete()
    assert not (tmp_path / FILE).exists()


def test_a_line_that_was_not_written_to_its_end_does_not_count(
    plan: Plan, fakes: Fake, tmp_path: Path
) -> None:
    first, second, *_ = fakes(plan)
    with Journal.begin(tmp_path, SETTINGS) as journal:
        journal.add(first)
        journal.add(second)
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes()[:-20])
    with Journal.resume(tmp_path, SETTINGS) as journal:
        assert [run.task for run in journal.runs] == [first.task]
        journal.add(second)
    with Journal.resume(tmp_path, SETTINGS) as journal:
        assert [run.task for run in journal.runs] == [first.task, second.task]


def test_other_settings_are_named(tmp_path: Path) -> None:
    with Journal.begin(tmp_path, SETTINGS):
        pass
    other = SETTINGS | {"requests": 200, "outages": True}
    with pytest.raises(JournalError, match="requests: 100 → 200; outages: not set → true"):
        Journal.resume(tmp_path, other)


def test_there_must_be_something_to_go_on_with(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="holds no evaluation that was broken off"):
        Journal.resume(tmp_path, SETTINGS)
    for damaged in (b"", b"no JSON\n", b"{}\n{}\n"):
        (tmp_path / FILE).write_bytes(damaged)
        with pytest.raises(JournalError, match="is damaged, or of another release"):
            Journal.resume(tmp_path, SETTINGS)
