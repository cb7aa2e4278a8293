"""Which loads are put on an engine to measure it; all numbers here are ours."""

import random
from dataclasses import dataclass

SHORT_PROMPT = 32
CONTEXT_SHARES = (0.25, 0.7)
"""Further prompt lengths, as shares of the engine's context."""
KV_SHARE = 0.9
"""Share of the KV cache that a load may fill: none may be preempted."""
CHUNK_SHARES = (0.125, 0.25, 0.5, 1.0)
"""Prompts that join a decoding batch, as shares of what the token budget leaves."""
MANY_CHUNKS = 4
MIXED_BATCH = 8
WARM_UP = 8
"""Iterations before a window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What the loads must keep within."""

    context_tokens: int
    concurrency: int
    kv_capacity_tokens: int
    max_batched_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A prompt that joins the decoding batch: ``chunks`` iterations of ``tokens`` each."""

    tokens: int
    chunks: int = 1

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return self.tokens * self.chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Sequences that decode together, and prompts that join them one after another."""

    batch: int
    prompt_tokens: int
    output_tokens: int
    """At most; the load ends when it is measured."""
    arrivals: tuple[Arrival, ...] = ()


def design(limits: EngineLimits, *, iterations: int, seed: int) -> list[Load]:
    """Loads for windows of ``iterations``, in random order so that drift hits all alike."""
    prompts = {SHORT_PROMPT: None} | {
        int(share * limits.context_tokens): None for share in CONTEXT_SHARES
    }
    loads = [
        load
        for prompt in prompts
        for batch in _batches(limits.concurrency)
        if (load := _load(limits, batch=batch, prompt=prompt, iterations=iterations))
    ]
    random.Random(seed).shuffle(loads)
    return loads


def _batches(concurrency: int) -> list[int]:
    """1, 2, 4, ... and the concurrency itself; every other one where those are many."""
    powers = [2**i for i in range(concurrency.bit_length()) if 2**i < concurrency]
    while len(powers) > 6:
        powers = powers[:1] + powers[2::2]
    return [*powers, concurrency]


def _load(limits: EngineLimits, *, batch: int, prompt: int, iterations: int) -> Load | None:
    room = min(limits.context_tokens, int(KV_SHARE * limits.kv_capacity_tokens / batch)) - prompt
    # Sequences start one after another: the first ones decode while the last ones wait.
    start = batch * -(-prompt // limits.max_batched_tokens) + WARM_UP
    if room < start + iterations:
        return None
    arrivals: tuple[Arrival, ...] = ()
    if prompt <= limits.context_tokens // 2 and room > 8 * iterations + start:
        arrivals = _arrivals(limits, batch=batch, prompt=prompt)
    return Load(batch=batch, prompt_tokens=prompt, output_tokens=room, arrivals=arrivals)


def _arrivals(limits: EngineLimits, *, batch: int, prompt: int) -> tuple[Arrival, ...]:
    """What joins: many sizes beside one sequence, full budgets beside some more."""
    short = prompt == SHORT_PROMPT
    if batch >= limits.concurrency or batch not in (1, MIXED_BATCH):
        return ()
    full = limits.max_batched_tokens - batch
    longest = limits.context_tokens - 1
    shares = CHUNK_SHARES if short else CHUNK_SHARES[-1:]
    sizes = {size: None for share in shares if 0 < (size := int(share * full)) <= longest}
    chunks = min(MANY_CHUNKS, longest // full)
    many = [Arrival(tokens=full, chunks=chunks)] if chunks > 1 and short else []
    return (*(Arrival(tokens=size) for size in sizes), *many)
