"""The in-flight table against a plain model, and the gauges by hand."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pointsman_core.state import GAUGES_STALE_AFTER_S, Admitted, EngineLoad, LiveState

A, B, C = "10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000"
POOL = [f"10.0.0.{i}:8000" for i in range(6)]
IDS = [f"r{i}" for i in range(12)]


@pytest.fixture
def state() -> LiveState:
    state = LiveState()
    state.set_endpoints([A, B])
    return state


class TableMachine(RuleBasedStateMachine):
    """Random calls on `LiveState`, and the same on dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.state = LiveState()
        self.requests: dict[str, dict] = {}
        self.ready: dict[str, bool] = {}
        self.left: set[str] = set()
        self.most_known = 0

    @rule(wanted=st.lists(st.sampled_from(POOL), max_size=8))
    def set_endpoints(self, wanted):
        before = {address: self.state.row(address) for address in self.ready}
        occupied = {request["address"] for request in self.requests.values()}
        self.state.set_endpoints(wanted)
        kept = {
            a: a in wanted and (r or a in self.left)
            for a, r in self.ready.items()
            if a in {*wanted, *occupied}
        }
        self.left = kept.keys() - {*wanted}
        self.ready = dict.fromkeys(wanted, True) | kept
        self.most_known = max(self.most_known, len(self.ready))
        assert all(self.state.row(a) == before[a] for a in kept), "a known endpoint changed its row"

    @rule(address=st.sampled_from(POOL), ready=st.booleans())
    def set_ready(self, address, ready):
        news = address in self.ready and self.ready[address] != ready
        assert self.state.set_ready(address, ready=ready) is news
        if news:
            self.ready[address] = ready

    @precondition(lambda self: self.ready)
    @rule(
        data=st.data(),
        request_id=st.sampled_from(IDS),
        prompt=st.integers(1, 10_000),
        streams=st.booleans(),
    )
    def begin(self, data, request_id, prompt, streams):
        address = data.draw(st.sampled_from(sorted(self.ready)))
        admitted = Admitted(
            arrival_s=prompt / 7,
            prompt_tokens=prompt,
            expected_output_tokens=prompt + 1,
            limit_s=prompt + 2,
            quality=prompt + 3,
            streams=streams,
        )
        if request_id in self.requests:
            with pytest.raises(ValueError, match="in flight already"):
                self.state.begin(request_id, address, admitted)
        else:
            self.state.begin(request_id, address, admitted)
            self.requests[request_id] = {"address": address, "admitted": admitted, "tokens": 0}

    @rule(request_id=st.sampled_from(IDS), address=st.sampled_from(POOL))
    def begin_on_an_unknown_endpoint(self, request_id, address):
        if address not in self.ready:
            with pytest.raises(KeyError):
                self.state.begin(request_id, address, Admitted(0, 1, 1, 1, 1))

    @rule(request_id=st.sampled_from(IDS), count=st.integers(0, 9))
    def add_tokens(self, request_id, count):
        self.state.add_tokens(request_id, count)
        if request_id in self.requests:
            self.requests[request_id]["tokens"] += count

    @rule(request_id=st.sampled_from(IDS), address=st.sampled_from(POOL))
    def move(self, request_id, address):
        request = self.requests.get(request_id)
        news = request is not None and address in self.ready and request["address"] != address
        assert self.state.move(request_id, address) is news
        if news:
            request["address"] = address

    @rule(request_id=st.sampled_from(IDS))
    def finish(self, request_id):
        assert self.state.finish(request_id) is (self.requests.pop(request_id, None) is not None)

    @invariant()
    def entries_are_neither_lost_nor_doubled(self):
        assert len(self.state) == len(self.requests)
        assert all((i in self.state) == (i in self.requests) for i in IDS)
        columns = [array.tolist() for _, array in self.state.residents().columns()]
        assert sorted(zip(*columns, strict=True)) == sorted(
            map(self._entry, self.requests.values())
        )

    @invariant()
    def requests_are_counted_where_they_are(self):
        where = [request["address"] for request in self.requests.values()]
        assert all(self.state.in_flight(a) == where.count(a) for a in POOL)

    @invariant()
    def endpoints_have_rows_of_their_own_and_free_ones_are_used_again(self):
        assert set(self.state.addresses) == set(self.ready)
        rows = [self.state.row(a) for a in self.ready]
        assert len(set(rows)) == len(rows)
        assert self.state.rows == self.most_known
        assert {a: self.state.is_ready(a) for a in self.ready} == self.ready
        assert self.state.ready().sum() == sum(self.ready.values())

    def _entry(self, request):
        a = request["admitted"]
        return (
            self.state.row(request["address"]),
            *(a.arrival_s, a.prompt_tokens, a.expected_output_tokens),
            *(request["tokens"], float(a.streams), a.limit_s, a.quality),
        )


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_table_grows_and_keeps_every_entry(state, build):
    for i in range(1000):
        state.begin(f"r{i}", A if i % 2 else B, build.admitted(prompt_tokens=float(i)))
    assert sorted(state.residents().prompt_tokens.tolist()) == [float(i) for i in range(1000)]
    assert state.in_flight(A) == state.in_flight(B) == 500


def test_an_endpoint_that_left_is_not_ready_and_goes_when_its_last_request_has_ended(state, build):
    state.begin("r", B, build.admitted())
    state.set_endpoints([A])
    assert state.in_flight(B) == 1
    assert not state.is_ready(B)
    state.finish("r")
    state.set_endpoints([A])
    assert state.addresses == (A,)


def test_an_endpoint_that_comes_back_starts_anew_also_with_requests_on_it(state, build):
    state.begin("r", B, build.admitted())
    state.set_ready(B, ready=False)
    state.set_endpoints([A])
    state.set_endpoints([A, B])
    assert state.is_ready(B)
    assert state.in_flight(B) == 1
    state.set_ready(B, ready=False)
    state.set_endpoints([A, B])
    assert not state.is_ready(B), "it had not left"


def test_a_reused_row_starts_without_the_gauges_of_its_former_endpoint(state):
    state.set_load(B, EngineLoad(running=5, waiting=5, kv_usage=0.9), now_s=1.0)
    state.set_load(B, EngineLoad(running=5, waiting=5, kv_usage=0.9), now_s=1.0)
    row = state.row(B)
    state.set_endpoints([A, C])
    assert state.row(C) == row
    assert state.foreign(now_s=1.0)[row] == 0
    assert np.isnan(state.kv_usage(now_s=1.0)[row])
    assert state.load(B) is None
    assert state.load(C) is None
    state.set_load(C, EngineLoad(running=5, waiting=0), now_s=2.0)
    assert state.foreign(now_s=2.0)[row] == 0, "one scrape alone is not believed"


def test_unknown_endpoints_and_requests_are_ignored(state):
    assert not state.set_ready(C, ready=True)
    assert not state.is_ready(C)
    assert state.in_flight(C) == 0
    state.set_load(C, EngineLoad(running=1, waiting=1), now_s=0.0)
    assert state.load(C) is None
    state.add_tokens("nobody", 3)
    assert not state.finish("nobody")


class TestGauges:
    @pytest.mark.parametrize(
        ("desc", "own", "scrapes", "want"),
        [
            ("the first scrape alone is not believed", 0, [(3, 2)], 0),
            ("running and waiting count", 0, [(3, 2), (3, 2)], 5),
            ("our own requests do not", 4, [(3, 2), (3, 2)], 1),
            ("the smaller of the last two holds", 0, [(9, 0), (4, 0), (7, 0)], 4),
            ("a queue that ended is gone at once", 0, [(9, 0), (9, 0), (0, 0)], 0),
            ("an engine that lags behind us has none", 4, [(1, 0), (1, 0)], 0),
        ],
    )
    def test_foreign_requests(self, desc, own, scrapes, want, state, build):
        for i in range(own):
            state.begin(f"r{i}", B, build.admitted())
        for running, waiting in scrapes:
            state.set_load(B, EngineLoad(running=running, waiting=waiting), now_s=10.0)
        assert state.foreign(now_s=10.0).tolist() == [0, want], desc

    @pytest.mark.parametrize(("age", "fresh"), [(0.0, True), (1.0, True), (1.001, False)])
    def test_stale_gauges_are_ignored_but_still_shown(self, age, fresh, state):
        load = EngineLoad(running=3, waiting=0, kv_usage=0.5)
        for _ in range(2):
            state.set_load(A, load, now_s=10.0)
        now = 10.0 + age * GAUGES_STALE_AFTER_S
        assert state.foreign(now_s=now)[0] == (3 if fresh else 0)
        assert state.kv_usage(now_s=now)[0] == pytest.approx(0.5 if fresh else np.nan, nan_ok=True)
        assert state.load(A) is load

    def test_each_counts_until_it_is_stale_whenever_they_are_asked(self, state):
        for address, running, at in ((A, 3, 1.0), (B, 7, 2.0)):
            for _ in range(2):
                state.set_load(address, EngineLoad(running=running, waiting=0), now_s=at)
        stale_a, stale_b = (at + GAUGES_STALE_AFTER_S for at in (1.0, 2.0))
        for now, want in (
            (2.0, [3, 7]),
            (stale_a, [3, 7]),
            (stale_a + 0.5, [0, 7]),
            (stale_b + 0.5, [0, 0]),
            (3.0, [3, 7]),
        ):
            assert state.foreign(now_s=now).tolist() == want, now
        state.set_load(A, EngineLoad(running=1, waiting=0), now_s=stale_b)
        assert state.foreign(now_s=stale_b).tolist() == [1, 7], "news count at once"

    def test_an_engine_that_does_not_tell_its_kv_use_has_none(self, state):
        state.set_load(A, EngineLoad(running=0, waiting=0, kv_usage=0.5), now_s=0.0)
        state.set_load(A, EngineLoad(running=0, waiting=0), now_s=0.0)
        assert np.isnan(state.kv_usage(now_s=0.0)).all()
