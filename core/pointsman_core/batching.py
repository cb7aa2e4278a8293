"""Continuous batching of one endpoint: which request runs in which engine iteration.

The rules are those of vLLM's V1 scheduler (first come, first served, chunked prefill):

1. Every running sequence is advanced, oldest first: by one token once it decodes, else by
   a chunk of its prompt. All share one token budget per iteration.
2. The KV cache is handed out in blocks of `BLOCK_TOKENS` tokens. When none is free for a
   running sequence, the youngest running one is preempted: it loses its cache, goes back
   to the head of the queue and later computes prompt and answer so far again.
3. What is left of the budget goes to the head of the queue, as long as a place in the
   batch is free and the whole sequence so far fits into the free blocks. Nothing is
   admitted in an iteration that preempted.
4. The iteration that computes the last known token of a sequence yields its next one.

Arrival order is never changed: all running sequences arrived before all waiting ones, so
only the youngest running one can be in prefill, and decodes come first by themselves.

Pure and deterministic: no clock, no I/O. `CostModel` tells how long an iteration takes.
"""

from collections import deque
from dataclasses import dataclass

from pointsman_core.cost import CostModel

BLOCK_TOKENS = 16
"""Tokens in one block of the KV cache; vLLM's default on GPUs."""


class DoesNotFitError(ValueError):
    """A request that the KV cache could not hold even if it ran alone."""


@dataclass(frozen=True, slots=True)
class Iteration:
    """One pass of the engine over its batch; tokens come out at its end."""

    seconds: float
    """How long it takes."""
    tokens: tuple[str, ...]
    """Requests that got one output token each, oldest first."""
    finished: tuple[str, ...]
    """Those of them for which it was the last one."""
    preempted: tuple[str, ...]
    """Requests sent back to the queue, youngest first."""
    prefill_tokens: int
    """Tokens of prompts computed, including those computed again after a preemption."""
    decode_tokens: int
    """Sequences advanced by a single decoded token."""
    context_tokens: int
    """Tokens in the KV cache of all sequences of the batch, at the end."""


@dataclass(slots=True, eq=False)
class _Sequence:
    request_id: str
    prompt_tokens: int
    output_tokens: int
    generated: int = 0
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    blocks: int = 0

    @property
    def known(self) -> int:
        return self.prompt_tokens + self.generated


@dataclass(slots=True)
class _Plan:
    """What one iteration will compute: tokens of each sequence."""

    budget: int
    chunks: list[tuple[_Sequence, int]]
    preempted: list[str]

    def add(self, sequence: _Sequence, tokens: int) -> None:
        self.chunks.append((sequence, tokens))
        self.budget -= tokens


class Batcher:
    """The batch and the queue of one endpoint."""

    def __init__(self, cost: CostModel) -> None:
        if cost.max_sequences < 1 or cost.max_batched_tokens < 1:
            raise ValueError("max_sequences and max_batched_tokens must be at least 1")
        self._cost = cost
        self._running: list[_Sequence] = []
        self._waiting: deque[_Sequence] = deque()
        self._sequences: dict[str, _Sequence] = {}
        self.total_blocks = cost.kv_capacity_tokens // BLOCK_TOKENS
        """Blocks that the KV cache has; a capacity that is no multiple is rounded down."""
        self.free_blocks = self.total_blocks
        """Blocks that no sequence holds."""
        self.iterations = 0
        """Iterations run so far."""
        self.preemptions = 0
        """Preemptions so far."""
        self.busy_seconds = 0.0
        """Time of all iterations so far."""

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests in the queue, preempted ones included."""
        return len(self._waiting)

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache's blocks in use, 0 to 1."""
        return 1.0 - self.free_blocks / self.total_blocks if self.total_blocks else 0.0

    def submit(self, request_id: str, *, prompt_tokens: int, output_tokens: int) -> None:
        """Queue a request that will answer ``prompt_tokens`` with ``output_tokens``.

        Raises `DoesNotFitError` if prompt and answer exceed the whole KV cache, and
        `ValueError` for counts below 1 or an id that is still in use.
        """
        if prompt_tokens < 1 or output_tokens < 1:
            raise ValueError(
                f"request {request_id!r}: prompt and output need at least one token each, "
                f"got {prompt_tokens} and {output_tokens}"
            )
        if request_id in self._sequences:
            raise ValueError(f"request {request_id!r} is already queued or running")
        capacity = self.total_blocks * BLOCK_TOKENS
        if prompt_tokens + output_tokens > capacity:
            raise DoesNotFitError(
                f"request {request_id!r} can never run: {prompt_tokens} prompt tokens and "
                f"{output_tokens} output tokens exceed the KV cache of {capacity} tokens"
            )
        sequence = _Sequence(request_id, prompt_tokens, output_tokens)
        self._sequences[request_id] = sequence
        self._waiting.append(sequence)

    def cancel(self, request_id: str) -> bool:
        """Drop a request and free its blocks; False if it is unknown or already done."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        queue = self._running if sequence in self._running else self._waiting
        queue.remove(sequence)
        self._release(sequence)
        return True

    def step(self) -> Iteration | None:
        """Run one iteration; None if there is nothing to do.

        The batch is left as it is at the iteration's end. Whoever keeps a clock must
        hold back the returned events until ``seconds`` have passed.
        """
        if not self._sequences:
            return None
        plan = _Plan(budget=self._cost.max_batched_tokens, chunks=[], preempted=[])
        self._plan_running(plan)
        if not plan.preempted:
            self._plan_waiting(plan)
        return self._execute(plan)

    def _plan_running(self, plan: _Plan) -> None:
        index = 0
        while index < len(self._running):  # preemption shortens the list at its end
            sequence = self._running[index]
            tokens = min(sequence.known - sequence.computed, plan.budget)
            if not self._make_room(sequence, tokens, plan):
                return
            plan.add(sequence, tokens)
            index += 1

    def _make_room(self, sequence: _Sequence, tokens: int, plan: _Plan) -> bool:
        """Reserve blocks, preempting the youngest if need be; False if that was itself."""
        while not self._reserve(sequence, tokens):
            victim = self._running.pop()
            self._release(victim)
            victim.computed = 0
            self._waiting.appendleft(victim)
            self.preemptions += 1
            plan.preempted.append(victim.request_id)
            if victim is sequence:
                return False
        return True

    def _plan_waiting(self, plan: _Plan) -> None:
        while self._waiting and plan.budget and len(self._running) < self._cost.max_sequences:
            sequence = self._waiting[0]
            if _blocks(sequence.known) > self.free_blocks:
                return
            tokens = min(sequence.known, plan.budget)
            self._reserve(sequence, tokens)
            self._running.append(self._waiting.popleft())
            plan.add(sequence, tokens)

    def _reserve(self, sequence: _Sequence, tokens: int) -> bool:
        missing = _blocks(sequence.computed + tokens) - sequence.blocks
        if missing > self.free_blocks:
            return False
        sequence.blocks += missing
        self.free_blocks -= missing
        return True

    def _release(self, sequence: _Sequence) -> None:
        self.free_blocks += sequence.blocks
        sequence.blocks = 0

    def _execute(self, plan: _Plan) -> Iteration:
        prefill = decode = context = 0
        tokens: list[str] = []
        finished: list[str] = []
        for sequence, chunk in plan.chunks:
            if sequence.generated and sequence.known - sequence.computed == 1:
                decode += 1
            else:
                prefill += chunk
            sequence.computed += chunk
            context += sequence.computed
            if sequence.computed == sequence.known:
                sequence.generated += 1
                tokens.append(sequence.request_id)
                if sequence.generated == sequence.output_tokens:
                    finished.append(sequence.request_id)
                    self._release(self._sequences.pop(sequence.request_id))
        if finished:
            self._running = [s for s in self._running if s.generated < s.output_tokens]
        seconds = self._cost.iteration_seconds(
            prefill_tokens=prefill, decode_sequences=decode, context_tokens=context
        )
        self.iterations += 1
        self.busy_seconds += seconds
        return Iteration(
            seconds=seconds,
            tokens=tuple(tokens),
            finished=tuple(finished),
            preempted=tuple(plan.preempted),
            prefill_tokens=prefill,
            decode_tokens=decode,
            context_tokens=context,
        )


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)
