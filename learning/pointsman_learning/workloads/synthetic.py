"""A corpus without any data: prompts from templates whose words tell who answers them well.

What the words tell can be learned: every domain has words of its own, and each expert has
topics, told by words as well, in which it is better or worse than its declared mean. So a
predictor that reads prompts beats declared priors here, as it does on real data.
"""

import hashlib
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from pointsman_core.snapshot import Snapshot
from pointsman_core.state import FloatArray
from pointsman_core.workload import WorkloadError, draw_scores
from pointsman_learning.workloads.corpus import GUESSED_TOKENS, SPLITS, Corpus, Split, check_split
from pointsman_learning.workloads.pools import edge_site

SIZES: Mapping[Split, int] = {"train": 2000, "validation": 300, "test": 500}
"""Prompts of each split."""

TOPIC_SPREAD = 0.2
"""Standard deviation by which an expert's mean differs between topics of a domain. Ours."""

DOMAINS: Mapping[str, tuple[str, ...]] = {
    "code": (
        "Write a Python function to {topic} and return the result for {n} items.",
        "def step_{n}(numbers: list[int]) -> int:\n    # {topic}, then return the sum",
        "Fix the source code that should {topic} in {n} steps.",
    ),
    "math": (
        "{name} wants to {topic}. How many steps does {name} need for {n} units in total?",
        "Solve the equation: {n} x + 3 = {n}, then {topic}. Express your answer in \\boxed{{}}.",
        "What is the probability to {topic} within {n} tries?",
    ),
    "science": (
        "Which of the following best describes how to {topic} at {n} degrees? A. heat B. water",
        "A student observes for {n} days how to {topic}. Which organism explains it?",
        "What is most likely needed to {topic} on the moon for {n} hours? A. energy B. soil",
    ),
    "commonsense": (
        "{name} would like to {topic}. Where would {name} most likely go after {n} minutes?",
        "What might someone do who must {topic} and didn't want to wait {n} hours?",
        "If I {topic} with {n} others, what would happen next?",
    ),
    "knowledge": (
        "who was the first to {topic} and when did it take place in the year {n}",
        "Which country did {topic} in a film of {n}?",
        "what was the name of the king who ordered to {topic} in {n}",
    ),
}
_VERBS = ("sort", "count", "merge", "divide", "copy", "draw", "measure", "carry", "hide", "trade")
_OBJECTS = ("the stones", "two ropes", "every ticket", "old coins", "red lamps", "long letters")
_NAMES = ("Ada", "Ben", "Carla", "Deniz", "Elif", "Farid", "Greta", "Hiro")


def synthetic_corpus(split: Split, snapshot: Snapshot | None = None) -> Corpus:
    """Make the corpus for a pool's experts (the edge site's without one); always the same.

    A score is 1 or 0 with a mean that depends on domain and topic, around the prior that the
    expert declares for the domain.
    """
    check_split(split)
    experts: dict[str, dict[str, float]] = {}
    for candidate in (snapshot or edge_site()).candidates:
        declared = {d.name: d.score for d in candidate.quality.domains}
        default = candidate.quality.default
        experts.setdefault(candidate.model, {d: declared.get(d, default) for d in DOMAINS})
    if not experts:
        raise WorkloadError("needs at least one expert", source="synthetic corpus")
    return _make(split, tuple((name, tuple(means.values())) for name, means in experts.items()))


@lru_cache(maxsize=64)
def _make(split: Split, experts: tuple[tuple[str, tuple[float, ...]], ...]) -> Corpus:
    rng = np.random.default_rng([SPLITS.index(split), 20_231])
    size = SIZES[split]
    domains = tuple(DOMAINS)
    domain = rng.integers(len(domains), size=size)
    verb, thing = rng.integers(len(_VERBS), size=size), rng.integers(len(_OBJECTS), size=size)
    declared = np.array([means for _, means in experts]).T
    better = np.stack([_topic_effects(name) for name, _ in experts], axis=-1)
    means = np.clip(declared[domain] + better[domain, verb], 0.02, 0.98)
    prompts = tuple(
        _prompt(rng, domains[d], f"{_VERBS[v]} {_OBJECTS[o]}")
        for d, v, o in zip(domain, verb, thing, strict=True)
    )
    told = tuple(domains[d] for d in domain)
    return Corpus(
        split=split,
        prompts=prompts,
        experts=tuple(name for name, _ in experts),
        scores=draw_scores(rng, means),
        tasks=told,
        domains=told,
        verbosity=np.array([_verbosity(name) for name, _ in experts]),
        edge=np.ones(len(experts), np.bool_),
        output_tokens=np.full((size, len(experts)), np.nan),
        source=f"a synthetic generator ({split} split)",
    )


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])


def _topic_effects(name: str) -> FloatArray:
    """(domains, verbs) by how much the expert is better there; the same in all splits."""
    rng = np.random.default_rng(_seed(name))
    return TOPIC_SPREAD * rng.standard_normal((len(DOMAINS), len(_VERBS)))


def _verbosity(name: str) -> float:
    """Mean answer length, from a third to thrice the usual."""
    rng = np.random.default_rng(_seed(f"verbosity of {name}"))
    return GUESSED_TOKENS * float(np.exp(rng.uniform(-1.0, 1.0)))


def _prompt(rng: np.random.Generator, domain: str, topic: str) -> str:
    templates = DOMAINS[domain]
    return templates[rng.integers(len(templates))].format(
        n=rng.integers(10, 100_000), name=_NAMES[rng.integers(len(_NAMES))], topic=topic
    )
