"""A made-up site of any size to measure deciders on."""

from collections.abc import Iterator, Sequence

import numpy as np
import yaml

from pointsman_core.resources import (
    Algorithm,
    Backend,
    DomainRule,
    DomainScore,
    Engine,
    EngineMetrics,
    ExpertLimits,
    LLMExpert,
    LLMExpertSpec,
    ObjectMeta,
    PerformanceProfile,
    QualityPriors,
    RoutingPolicy,
    RoutingPolicySpec,
)

DOMAINS = ("code", "math", "science")
PROMPT_WORDS = 400
"""About 2 kB of prompt, which is 500 tokens."""


def experts(addresses: Sequence[str], *, seed: int = 0) -> list[LLMExpert]:
    """One expert per address, of unequal quality and speed."""
    rng = np.random.default_rng(seed)
    return [_expert(i, address, rng) for i, address in enumerate(addresses)]


def _expert(index: int, address: str, rng: np.random.Generator) -> LLMExpert:
    scores = [DomainScore(name=d, score=float(rng.uniform(0.2, 0.9))) for d in DOMAINS]
    spec = LLMExpertSpec(
        model=f"model-{index}",
        backend=Backend(addresses=[address]),
        # A minute between looks: the probe must not disturb the measurement.
        engine=Engine(metrics=EngineMetrics(enabled=False, interval_ms=60_000)),
        limits=ExpertLimits(concurrency=64),
        profile=PerformanceProfile(memory_bandwidth_gbps=float(rng.uniform(300, 1000))),
        quality=QualityPriors(default=0.5, domains=scores),
    )
    return LLMExpert(metadata=ObjectMeta(name=f"expert-{index}"), spec=spec)


def policy(algorithm: Algorithm) -> RoutingPolicy:
    """A policy that answers the model name ``bench/<algorithm>``."""
    rules = [DomainRule(name=d, keywords=[d, f"{d}s", f"about {d}"]) for d in DOMAINS]
    spec = RoutingPolicySpec(models=[model_name(algorithm)], algorithm=algorithm, domains=rules)
    return RoutingPolicy(metadata=ObjectMeta(name=f"bench-{algorithm.lower()}"), spec=spec)


def model_name(algorithm: Algorithm) -> str:
    """The model name that selects the bench policy of an algorithm."""
    return f"bench/{algorithm}"


def manifests(addresses: Sequence[str], algorithms: Sequence[Algorithm]) -> str:
    """The whole site as YAML manifests."""
    resources = [*experts(addresses), *(policy(algorithm) for algorithm in algorithms)]
    documents = (r.model_dump(mode="json", by_alias=True, exclude_none=True) for r in resources)
    return str(yaml.safe_dump_all(documents))


def prompts(count: int, *, seed: int = 0) -> Iterator[str]:
    """Prompts of about 2 kB in all domains."""
    rng = np.random.default_rng(seed)
    words = np.array([*DOMAINS, "please", "explain", "question", "answer", "number", "writing"])
    for _ in range(count):
        yield " ".join(rng.choice(words, PROMPT_WORDS))
