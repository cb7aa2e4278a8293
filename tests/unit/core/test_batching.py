import math
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman_core.batching import BLOCK_TOKENS, Batcher, DoesNotFitError, Iteration
from pointsman_core.cost import CostModel


def make_cost(*, blocks=1000, sequences=8, budget=64):
    """Every number a different power of two, so that sums tell what they are made of."""
    return CostModel(
        overhead_s=2**-6,
        compute_s_per_token=2**-8,
        weights_s=2**-4,
        context_s_per_token=2**-16,
        kv_capacity_tokens=blocks * BLOCK_TOKENS,
        max_sequences=sequences,
        max_batched_tokens=budget,
    )


def make_batcher(**cost):
    return Batcher(make_cost(**cost))


def run(batcher: Batcher) -> list[Iteration]:
    iterations = []
    while (iteration := batcher.step()) is not None:
        iterations.append(iteration)
    return iterations


class TestOneRequest:
    def test_time_is_prefill_plus_decodes(self):
        prompt, output, budget = 150, 20, 64
        cost = make_cost(budget=budget)
        batcher = Batcher(cost)
        batcher.submit("a", prompt_tokens=prompt, output_tokens=output)
        iterations = run(batcher)

        chunks = [64, 64, 22]
        prefill = sum(
            cost.overhead_s
            + max(
                cost.compute_s_per_token * chunk,
                cost.weights_s + cost.context_s_per_token * sum(chunks[: index + 1]),
            )
            for index, chunk in enumerate(chunks)
        )
        decode = sum(
            cost.overhead_s + cost.weights_s + cost.context_s_per_token * (prompt + token)
            for token in range(1, output)
        )
        assert batcher.busy_seconds == prefill + decode  # exact: powers of two
        assert sum(iteration.seconds for iteration in iterations) == batcher.busy_seconds
        assert batcher.iterations == len(iterations) == len(chunks) + output - 1

    def test_first_token_comes_with_the_last_chunk_of_the_prompt(self):
        batcher = make_batcher(budget=10)
        batcher.submit("a", prompt_tokens=25, output_tokens=2)
        iterations = run(batcher)
        assert [i.tokens for i in iterations] == [(), (), ("a",), ("a",)]
        assert [i.prefill_tokens for i in iterations] == [10, 10, 5, 0]
        assert [i.decode_tokens for i in iterations] == [0, 0, 0, 1]
        assert [i.context_tokens for i in iterations] == [10, 20, 25, 26]
        assert [i.finished for i in iterations] == [(), (), (), ("a",)]

    def test_single_token_answer_needs_no_decode(self):
        batcher = make_batcher()
        batcher.submit("a", prompt_tokens=3, output_tokens=1)
        (iteration,) = run(batcher)
        assert iteration.tokens == iteration.finished == ("a",)
        assert iteration.decode_tokens == 0

    def test_fills_the_whole_cache(self):
        batcher = make_batcher(blocks=2)
        batcher.submit("a", prompt_tokens=16, output_tokens=16)
        run(batcher)
        assert batcher.preemptions == 0
        assert batcher.free_blocks == batcher.total_blocks == 2


class TestSharing:
    def test_nothing_to_do(self):
        assert make_batcher().step() is None

    def test_decodes_come_before_prefill_in_the_budget(self):
        batcher = make_batcher(budget=8)
        batcher.submit("a", prompt_tokens=4, output_tokens=9)
        batcher.submit("b", prompt_tokens=4, output_tokens=9)
        batcher.step()
        batcher.submit("c", prompt_tokens=100, output_tokens=1)
        iteration = batcher.step()
        assert iteration.tokens == ("a", "b")
        assert (iteration.decode_tokens, iteration.prefill_tokens) == (2, 6)

    def test_prompts_share_one_iteration(self):
        batcher = make_batcher(budget=10)
        for name in "abc":
            batcher.submit(name, prompt_tokens=4, output_tokens=1)
        first, second = run(batcher)
        assert first.tokens == ("a", "b")
        assert first.prefill_tokens == 10  # two of them c's
        assert second.tokens == ("c",)

    def test_batch_is_limited(self):
        batcher = make_batcher(sequences=2)
        for name in "abc":
            batcher.submit(name, prompt_tokens=1, output_tokens=3)
        batcher.step()
        assert (batcher.running, batcher.waiting) == (2, 1)
        finished = [i.finished for i in run(batcher) if i.finished]
        assert finished == [("a", "b"), ("c",)]

    def test_long_request_at_the_head_holds_up_shorter_ones(self):
        batcher = make_batcher(blocks=4)
        batcher.submit("a", prompt_tokens=17, output_tokens=3)
        batcher.submit("long", prompt_tokens=33, output_tokens=1)
        batcher.submit("short", prompt_tokens=1, output_tokens=1)
        assert batcher.step().tokens == ("a",)
        assert (batcher.running, batcher.waiting) == (1, 2)
        assert [i.tokens for i in run(batcher)] == [("a",), ("a",), ("long", "short")]

    def test_whole_prompt_must_fit_although_only_a_chunk_is_computed(self):
        batcher = make_batcher(blocks=4, budget=20)
        batcher.submit("a", prompt_tokens=17, output_tokens=2)
        batcher.submit("b", prompt_tokens=33, output_tokens=2)
        assert batcher.step().prefill_tokens == 17
        assert batcher.kv_usage == 0.5


class TestPreemption:
    def make_full(self):
        """Two sequences that need a third block each, of four."""
        batcher = make_batcher(blocks=4)
        batcher.submit("old", prompt_tokens=32, output_tokens=4)
        batcher.submit("young", prompt_tokens=32, output_tokens=4)
        return batcher

    def test_youngest_goes_back_to_the_queue(self):
        batcher = self.make_full()
        assert batcher.step().tokens == ("old", "young")
        assert batcher.kv_usage == 1.0
        iteration = batcher.step()
        assert iteration.preempted == ("young",)
        assert iteration.tokens == ("old",)
        assert (batcher.running, batcher.waiting, batcher.preemptions) == (1, 1, 1)

    def test_it_computes_prompt_and_answer_again(self):
        batcher = self.make_full()
        iterations = run(batcher)
        tokens = Counter(name for i in iterations for name in i.tokens)
        assert tokens == {"old": 4, "young": 4}
        # 32 + 32 prompts, then 32 + the one token that it had got.
        assert sum(i.prefill_tokens for i in iterations) == 32 + 32 + 33
        assert batcher.preemptions == 1

    def test_nothing_is_admitted_in_the_same_iteration(self):
        batcher = self.make_full()
        batcher.step()
        batcher.submit("tiny", prompt_tokens=1, output_tokens=1)
        assert batcher.step().tokens == ("old",)
        assert batcher.running == 1

    def test_queue_keeps_the_order_of_arrival(self):
        batcher = make_batcher(blocks=3)
        for name in "abc":
            batcher.submit(name, prompt_tokens=16, output_tokens=20)
        batcher.submit("late", prompt_tokens=1, output_tokens=1)
        batcher.step()
        assert batcher.step().preempted == ("c", "b")
        next_tokens = dict.fromkeys(name for i in run(batcher) for name in i.tokens)
        assert list(next_tokens) == ["a", "b", "c", "late"]


class TestCancel:
    def test_running_request_frees_its_blocks(self):
        batcher = make_batcher(blocks=4)
        batcher.submit("a", prompt_tokens=40, output_tokens=4)
        batcher.step()
        assert batcher.cancel("a")
        assert (batcher.running, batcher.free_blocks) == (0, 4)
        assert batcher.step() is None

    def test_waiting_request_leaves_the_queue(self):
        batcher = make_batcher(sequences=1)
        batcher.submit("a", prompt_tokens=1, output_tokens=2)
        batcher.submit("b", prompt_tokens=1, output_tokens=2)
        batcher.step()
        assert batcher.cancel("b")
        assert batcher.waiting == 0
        assert {name for i in run(batcher) for name in i.tokens} == {"a"}

    def test_unknown_or_finished_request_is_no_error(self):
        batcher = make_batcher()
        batcher.submit("a", prompt_tokens=1, output_tokens=1)
        batcher.step()
        assert not batcher.cancel("a")
        assert not batcher.cancel("never")

    def test_name_can_be_used_again(self):
        batcher = make_batcher()
        batcher.submit("a", prompt_tokens=1, output_tokens=1)
        batcher.cancel("a")
        batcher.submit("a", prompt_tokens=1, output_tokens=1)
        assert batcher.waiting == 1


class TestRefusal:
    def test_request_that_can_never_fit(self):
        batcher = make_batcher(blocks=2)
        with pytest.raises(DoesNotFitError, match=r"30 prompt .* 3 output .* 32 tokens"):
            batcher.submit("a", prompt_tokens=30, output_tokens=3)
        assert batcher.waiting == 0

    @pytest.mark.parametrize(("prompt", "output"), [(0, 1), (1, 0), (-1, 5)])
    def test_counts_below_one(self, prompt, output):
        with pytest.raises(ValueError, match="at least one token"):
            make_batcher().submit("a", prompt_tokens=prompt, output_tokens=output)

    def test_name_in_use(self):
        batcher = make_batcher()
        batcher.submit("a", prompt_tokens=1, output_tokens=1)
        with pytest.raises(ValueError, match="already"):
            batcher.submit("a", prompt_tokens=1, output_tokens=1)

    @pytest.mark.parametrize("wrong", [{"sequences": 0}, {"budget": 0}])
    def test_batch_without_room(self, wrong):
        with pytest.raises(ValueError, match="at least 1"):
            make_batcher(**wrong)

    def test_empty_cache_is_not_in_use(self):
        assert make_batcher(blocks=0).kv_usage == 0.0


# --- Properties ---------------------------------------------------------------------------


@dataclass
class Workload:
    blocks: int
    sequences: int
    budget: int
    requests: list[tuple[int, int, int]]
    """Iteration of arrival, prompt and output tokens."""
    cancelled: dict[int, int] = field(default_factory=dict)
    """Iteration in which a request is cancelled, by its index."""


@st.composite
def workloads(draw, *, cancels=False):
    blocks = draw(st.integers(1, 12))
    capacity = blocks * BLOCK_TOKENS
    requests = []
    for _ in range(draw(st.integers(1, 12))):
        prompt = draw(st.integers(1, capacity - 1))
        output = draw(st.integers(1, min(40, capacity - prompt)))
        requests.append((draw(st.integers(0, 30)), prompt, output))
    requests.sort(key=lambda request: request[0])
    indices = st.integers(0, len(requests) - 1)
    return Workload(
        blocks=blocks,
        sequences=draw(st.integers(1, 6)),
        budget=draw(st.integers(1, 48)),
        requests=requests,
        cancelled=draw(st.dictionaries(indices, st.integers(0, 60))) if cancels else {},
    )


@dataclass
class Trace:
    batcher: Batcher
    iterations: list[Iteration]


def play(load: Workload) -> Trace:
    """Run a workload to its end, checking at every iteration what must always hold."""
    cost = make_cost(blocks=load.blocks, sequences=load.sequences, budget=load.budget)
    trace = Trace(Batcher(cost), [])
    batcher = trace.batcher
    arrivals = list(enumerate(load.requests))
    tick = 0
    while arrivals or batcher.running or batcher.waiting:
        while arrivals and arrivals[0][1][0] <= tick:
            index, (_, prompt, output) = arrivals.pop(0)
            batcher.submit(str(index), prompt_tokens=prompt, output_tokens=output)
        for index, when in load.cancelled.items():
            if when == tick:
                batcher.cancel(str(index))
        iteration = batcher.step()
        if iteration is not None:
            trace.iterations.append(iteration)
            check(load, batcher, iteration)
        tick += 1
    return trace


def check(load: Workload, batcher: Batcher, iteration: Iteration) -> None:
    assert 0 <= batcher.free_blocks <= load.blocks
    assert 0.0 <= batcher.kv_usage <= 1.0
    assert batcher.running <= min(load.sequences, load.budget)
    # Every iteration gets on: nothing spins.
    assert 1 <= iteration.prefill_tokens + iteration.decode_tokens <= load.budget
    assert iteration.context_tokens <= load.blocks * BLOCK_TOKENS
    assert set(iteration.finished) <= set(iteration.tokens)
    assert not set(iteration.preempted) & set(iteration.tokens)
    assert len(set(iteration.tokens)) == len(iteration.tokens) <= load.sequences
    # All older requests of a batch are decoding: at most the youngest yields nothing.
    assert len(iteration.tokens) - len(iteration.finished) >= batcher.running - 1
    assert list(iteration.tokens) == sorted(iteration.tokens, key=int)


@given(load=workloads())
@settings(max_examples=200)
def test_every_request_gets_all_its_tokens_and_leaves_nothing_behind(load):
    trace = play(load)
    tokens = Counter(int(name) for i in trace.iterations for name in i.tokens)
    finished = Counter(int(name) for i in trace.iterations for name in i.finished)
    assert tokens == {index: output for index, (_, _, output) in enumerate(load.requests)}
    assert finished == dict.fromkeys(range(len(load.requests)), 1)
    assert trace.batcher.free_blocks == load.blocks
    assert trace.batcher.kv_usage == 0.0


@given(load=workloads())
def test_first_tokens_come_in_order_of_arrival(load):
    names = [name for i in play(load).iterations for name in i.tokens]
    first_seen = list(dict.fromkeys(map(int, names)))
    assert first_seen == sorted(first_seen)


@given(load=workloads())
def test_all_work_is_accounted_for(load):
    trace = play(load)
    cost = make_cost(blocks=load.blocks, sequences=load.sequences, budget=load.budget)
    for iteration in trace.iterations:
        assert iteration.seconds == cost.iteration_seconds(
            prefill_tokens=iteration.prefill_tokens,
            decode_sequences=iteration.decode_tokens,
            context_tokens=iteration.context_tokens,
        )
    assert trace.batcher.busy_seconds == math.fsum(i.seconds for i in trace.iterations)
    assert trace.batcher.iterations == len(trace.iterations)
    assert trace.batcher.preemptions == sum(len(i.preempted) for i in trace.iterations)
    # Prompt and all but the last token of an answer are computed once, if never preempted.
    computed = sum(i.prefill_tokens + i.decode_tokens for i in trace.iterations)
    needed = sum(prompt + output - 1 for _, prompt, output in load.requests)
    assert computed >= needed
    if not trace.batcher.preemptions:
        assert computed == needed


@given(load=workloads(cancels=True))
def test_cancelled_requests_leave_no_blocks_behind(load):
    trace = play(load)
    assert trace.batcher.free_blocks == load.blocks
    tokens = Counter(int(name) for i in trace.iterations for name in i.tokens)
    for index, (_, _, output) in enumerate(load.requests):
        assert tokens[index] <= output
        assert index in load.cancelled or tokens[index] == output


@given(load=workloads(cancels=True))
def test_same_workload_gives_the_same_iterations(load):
    assert play(load).iterations == play(load).iterations
