"""The compiled loops against the slow, obvious simulator."""

import os
import subprocess
import sys
from enum import IntEnum

import numpy as np
import pytest

from pointsman_core.batching import Batcher
from pointsman_learning.simulator import Change, check, reference
from pointsman_learning.simulator.reference import MismatchError, Reference, random_case, verify

CASES = 200
"""`pointsman bench simulator --verify` runs as many as one likes."""


def test_equal_to_the_last_bit_on_random_cases():
    compared = verify(CASES)
    assert compared.cases == CASES
    # The cases must reach the corners, or their being equal says little.
    assert compared.requests > 20 * CASES
    assert compared.tokens > 300 * CASES
    assert compared.preemptions > CASES
    assert compared.lost > CASES
    assert compared.rejected > CASES


def test_the_loops_mean_the_same_when_python_runs_them():
    program = "from pointsman_learning.simulator.reference import verify; print(verify(4, seed=1))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(verify(4, seed=1))


def test_cases_have_every_mishap_and_events_of_one_moment():
    cases = [random_case(np.random.default_rng((5, i))) for i in range(60)]
    for case in cases:
        check(case)
    assert {change.change for case in cases for change in case.availability} == set(Change)
    assert any(len(set(case.arrival_s)) < len(case) for case in cases)
    assert any(case.gauges.missing for case in cases)
    coincide = 0
    for case in cases:
        times = Reference(case, lambda _, ready: ready[0] if ready else -1).run().token_times
        tokens = {t for of_one in times.values() for t in of_one}
        coincide += len(tokens & set(case.arrival_s.tolist()))
    assert coincide > 20


class TestNoticesA:
    """What differs by a little must be found, or equality would mean nothing."""

    def expect(self, what):
        with pytest.raises(MismatchError, match=what):
            verify(60)

    def test_last_bit_of_a_time(self, monkeypatch):
        seconds = reference.CostModel.iteration_seconds
        monkeypatch.setattr(
            reference.CostModel,
            "iteration_seconds",
            lambda cost, **counts: float(np.nextafter(seconds(cost, **counts), 1.0)),
        )
        self.expect(r"case \d+ of seed 0")

    def test_different_order_of_admission(self, monkeypatch):
        class LastFirst(Batcher):
            def _plan_waiting(self, plan):
                self._waiting.reverse()
                super()._plan_waiting(plan)
                self._waiting.reverse()

        monkeypatch.setattr(reference, "Batcher", LastFirst)
        self.expect("request")

    def test_different_condition_of_admission(self, monkeypatch):
        class Hasty(Batcher):
            def _plan_waiting(self, plan):
                self.free_blocks += 1  # admits what just does not fit
                super()._plan_waiting(plan)
                self.free_blocks -= 1

        monkeypatch.setattr(reference, "Batcher", Hasty)
        self.expect("request")

    def test_different_victim_of_preemption(self, monkeypatch):
        class Unfair(Batcher):
            def _make_room(self, sequence, tokens, plan):
                self._running.sort(key=lambda s: s is sequence)  # itself first of all
                return super()._make_room(sequence, tokens, plan)

        monkeypatch.setattr(reference, "Batcher", Unfair)
        self.expect("request")

    def test_different_order_of_events_of_one_moment(self, monkeypatch):
        names = ("END", "READ_GAUGES", "CHANGE", "NOTICE", "BEGIN", "ARRIVE")
        monkeypatch.setattr(reference, "_Event", IntEnum("_Event", names))
        self.expect("request")

    def test_news_that_come_after_the_requests_of_that_moment(self, monkeypatch):
        names = ("END", "READ_GAUGES", "CHANGE", "ARRIVE", "NOTICE", "BEGIN")
        monkeypatch.setattr(reference, "_Event", IntEnum("_Event", names))
        self.expect("request")

    @pytest.mark.parametrize("name", ["finish_s", "preemptions", "endpoint"])
    def test_wrong_result(self, monkeypatch, name):
        run = Reference.run

        def wrong(self):
            result = getattr(run(self), name)
            if result:
                result[next(iter(result))] += 1
            return self

        monkeypatch.setattr(Reference, "run", wrong)
        self.expect(name.removesuffix("_s"))

    def test_wrong_gauge(self, monkeypatch):
        blocks = Reference._blocks_in_use
        monkeypatch.setattr(
            Reference, "_blocks_in_use", lambda self, endpoint: blocks(self, endpoint) + 1e-9
        )
        self.expect("KV usage when request")
